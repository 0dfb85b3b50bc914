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


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept(fails):
    blocks, kept = [Block(), Block()], []
    states = LayerStates(blocks, [EMBEDDING, 0], output_layer=1)

    def forward():
        x = torch.zeros(1)
        kept.append(weakref.ref(x))
        for block in blocks:
            x, _ = block(hidden_states=x)
        assert not fails, "out of memory, say"
        return x

    with suppress(AssertionError):
        states.collect(forward)
    gc.collect()
    assert kept[0]() is None


def test_a_hook_that_does_not_run_is_not_overlooked():
    states = LayerStates([Block(), Block(), Block()], [EMBEDDING, 1], output_layer=2)
    with pytest.raises(RuntimeError, match=r"layers \['embedding', 1\] did not run"):
        states.collect(lambda: torch.zeros(1))
