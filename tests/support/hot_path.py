"""Trains, and writes what each step did: how often the host read a tensor, what operations it made, how many graphs
dynamo has made so far, or how many sizes in them are symbols.

python -m tests.support.hot_path OUT.json [reads|operations|graphs|symbols] CONFIG.toml ...
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from let_plugin.config import load as toml_config
from let_plugin.runtime import data, host

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a scalar that is read, and calls of `READS`."""

    def __init__(self):
        super().__init__()
        self._num = 0
        for name in READS:
            own = getattr(torch.Tensor, name)

            def counted(tensor, *args, _own=own, **kwargs):
                self._num += 1
                return _own(tensor, *args, **kwargs)

            setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def pop(self):
        num, self._num = self._num, 0
        return num


class Operations(TorchDispatchMode):
    """Lists all that torch is told to do, forward and backward, with the shapes of the tensors."""

    def __init__(self):
        super().__init__()
        self._names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [list(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._names.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))

    def pop(self):
        names, self._names = self._names, []
        return names


class Graphs(contextlib.nullcontext):
    def pop(self):
        return counters["stats"]["unique_graphs"]


class Symbols(contextlib.nullcontext):
    def __init__(self):
        super().__init__()
        self._num = 0
        own = ShapeEnv.create_symbol

        def counted(*args, **kwargs):
            size = own(*args, **kwargs)
            self._num += not size.is_number  # one that is fixed is a number at once
            return size

        ShapeEnv.create_symbol = counted

    def pop(self):
        return self._num


MODES = {"reads": HostReads, "operations": Operations, "graphs": Graphs, "symbols": Symbols}


def main():
    out, what, config_file, *args = sys.argv[1:]
    host.set_up("cpu")
    data.register()
    config = toml_config.load(Path(config_file), args).config
    host.adapt_model_spec(config.model_spec)
    trainer = config.build()
    steps = []
    mode = MODES[what]()
    train_step = trainer.train_step

    def counting(data_iterator):
        with mode:
            train_step(data_iterator)
        steps.append(mode.pop())

    trainer.train_step = counting
    trainer.train()
    trainer.close()
    Path(out).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
