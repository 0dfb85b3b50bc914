"""What LayerStates collects, and what it keeps: nothing."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import nn

from let_plugin.alignment.layer_mapping import EMBEDDING
from let_plugin.teacher.base import num_blocks_to
from let_plugin.teacher.layers import LayerStates


class Block(nn.Module):
    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states):
        return (hidden_states + 1, "cache") if self.as_tuple else hidden_states + 1


class Model(nn.Module):
    """Adds 1 in each of three blocks, and 10 at the end."""

    def __init__(self, as_tuple=False, by_name=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(as_tuple) for _ in range(3))
        self.by_name = by_name

    def forward(self, x):
        for block in self.blocks:
            x = block(hidden_states=x) if self.by_name else block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x + 10


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("layers", "num_blocks", "output_layer", "expected"),
    [
        ([EMBEDDING], 1, 2, [0]),
        ([1], 2, 2, [2]),
        ([2], 3, None, [3]),
        ([2], 3, 2, [13]),
        ([2, EMBEDDING, 0], 3, None, [3, 0, 1]),
        ([0, 2], 3, 2, [1, 13]),
    ],
)
def test_states_in_the_order_asked_for(layers, num_blocks, output_layer, expected, as_tuple, by_name):
    assert num_blocks_to(layers) == num_blocks
    model = Model(as_tuple, by_name)
    states = LayerStates(model.blocks, layers, output_layer=output_layer)
    for _ in range(2):
        assert states.collect(lambda: model(torch.zeros(1, 1, 1))).flatten().tolist() == expected


def test_the_models_own_output_needs_no_hook_and_no_copy():
    model = Model()
    states = LayerStates(model.blocks, [2], output_layer=2)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    output = model(torch.zeros(1))
    assert states.collect(lambda: output) is output


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
