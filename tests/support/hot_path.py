"""Counts what each training step does, by wrapping a trainer's `train_step`.

Of an eager step: how often the host read a tensor ("reads"), and all that torch was told to do ("operations"). Of a
compiled one: how many graphs dynamo made ("graphs"), and how many sizes in them are symbols ("symbols").
"""

import contextlib
from unittest import mock

import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")


class Operations(TorchDispatchMode):
    """Lists all operations, forward and backward, with the shapes of the tensors; counts scalars that are read."""

    def __init__(self):
        super().__init__()
        self.operations, self.num_reads = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        shapes = [list(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.operations.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def calls_of(owner, name, counts=lambda result: True):
    """A list of what `counts` says of each call of a method of a class, by its result."""
    own, found = getattr(owner, name), []

    def counted(*args, **kwargs):
        found.append(counts(result := own(*args, **kwargs)))
        return result

    with mock.patch.object(owner, name, counted):
        yield found


def watch(trainer, *, compiled):
    """Returns a list that grows by a dict with each step."""
    steps = []
    train_step = trainer.train_step

    def watched(data_iterator):
        steps.append((_compiled if compiled else _eager)(lambda: train_step(data_iterator)))

    trainer.train_step = watched
    return steps


def _eager(step):
    with Operations() as operations, contextlib.ExitStack() as stack:
        reads = [stack.enter_context(calls_of(torch.Tensor, name)) for name in READS]
        step()
    return {"reads": operations.num_reads + sum(map(len, reads)), "operations": operations.operations}


def _compiled(step):
    before = counters["stats"]["unique_graphs"]
    # A size that is fixed is a number at once.
    with calls_of(ShapeEnv, "create_symbol", lambda size: not size.is_number) as symbols:
        step()
    return {"graphs": counters["stats"]["unique_graphs"] - before, "symbols": sum(symbols)}
