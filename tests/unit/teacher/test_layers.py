"""What LayerStates collects, and what it keeps: nothing."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import nn

from let_plugin.alignment.layer_mapping import EMBEDDING
from let_plugin.teacher.layers import LayerStates


class Block(nn.Module):
    def forward(self, hidden_states):
        return (hidden_states + 1, "cache")


class Model(nn.Module):
    """Adds 1 in each of three blocks, and 10 at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(hidden_states=x)
        return x + 10


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept(fails):
    model, kept = Model(), []
    states = LayerStates(model.blocks, [EMBEDDING, 0], output_layer=2)

    def forward():
        x = torch.zeros(1)
        kept.append(weakref.ref(x))
        output = model(x)
        assert not fails, "out of memory, say"
        return output

    with suppress(AssertionError):
        states.collect(forward)
    gc.collect()
    assert kept[0]() is None


def test_a_hook_that_does_not_run_is_not_overlooked():
    states = LayerStates(Model().blocks, [EMBEDDING, 1], output_layer=2)
    with pytest.raises(RuntimeError, match=r"layers \['embedding', 1\] did not run"):
        states.collect(lambda: torch.zeros(1))
