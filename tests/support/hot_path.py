"""Trains, and writes for each step how often the host read a tensor, and how many graphs dynamo has made so far.

python -m tests.support.hot_path OUT.json [reads|graphs] CONFIG.toml ...
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from let_plugin import data, host, toml_config

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a scalar that is read, and calls of `READS`."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def main():
    out, what, config_file, *args = sys.argv[1:]
    host.set_up("cpu")
    data.register()
    config = toml_config.load(Path(config_file), args).config
    host.adapt_model_spec(config.model_spec)
    trainer = config.build()
    steps = []
    reads = HostReads() if what == "reads" else None
    for name in READS if reads is not None else ():
        own = getattr(torch.Tensor, name)

        def counted(tensor, *args, _own=own, **kwargs):
            reads.num += 1
            return _own(tensor, *args, **kwargs)

        setattr(torch.Tensor, name, counted)
    train_step = trainer.train_step

    def counting(data_iterator):
        before = 0 if reads is None else reads.num
        with reads if reads is not None else contextlib.nullcontext():
            train_step(data_iterator)
        steps.append(counters["stats"]["unique_graphs"] if reads is None else reads.num - before)

    trainer.train_step = counting
    trainer.train()
    trainer.close()
    Path(out).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
