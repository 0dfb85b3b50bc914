"""Extras arrive with the batch that they were made of, whoever makes the batches, and are gone without a trace."""

import weakref

import pytest
import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from let_plugin.config.errors import ConfigError
from let_plugin.runtime.batch_extras import BatchExtras, take_extras


class Rows(IterableDataset):
    def __iter__(self):
        for i in range(8):
            yield {"input": torch.full((3,), i)}, torch.full((3,), i + 1)


class Twice:
    def __call__(self, input_dict, labels_BL):
        return {"twice": 2 * input_dict["input"] + labels_BL.sum(dim=-1, keepdim=True)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_extras_are_those_of_their_batch_and_end(num_workers):
    loader = StatefulDataLoader(Rows(), batch_size=2, num_workers=num_workers)
    make = Twice()
    extras = BatchExtras(loader, make)
    left = weakref.ref(make)
    del make
    seen = []
    for n, (input_dict, labels_BL) in enumerate(loader):
        taken = take_extras(input_dict)
        assert list(input_dict) == ["input"]
        if taken:
            assert torch.equal(taken["twice"], Twice()(input_dict, labels_BL)["twice"])
        seen.append(bool(taken))
        if n == 0:
            assert left() is not None
            extras.stop()
            assert left() is None
    assert seen[0] and not seen[-1] and len(seen) == 4


def test_another_kind_of_loader_is_refused():
    with pytest.raises(ConfigError, match="dataloader = 'list'"):
        BatchExtras([], Twice())
