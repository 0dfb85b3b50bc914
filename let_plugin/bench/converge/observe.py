"""`python -m let_plugin.bench.converge.observe REQUEST.json`: one run of a convergence suite, in a process of its own.

REQUEST.json says what to run (see `Request`); rank 0 writes what was seen at each evaluation. The run is let-train's.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from let_plugin import train
from let_plugin.bench.throughput.measure import largest_of_ranks, local_peak_memory

if TYPE_CHECKING:
    from torch import nn
    from torchtitan.trainer import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A run.

    Attributes:
        config: TOML file, complete; its validator is a TwoSplitValidator.
        out: Where the result goes, as JSON, after the evaluation at the last step.
        num_blocks: Train a shallower model of so many of the student's blocks.
    """

    config: str
    out: str
    num_blocks: int | None = None


def main(argv: list[str]) -> None:
    request = Request(**json.loads(Path(argv[0]).read_text()))

    def shorten(config: "Trainer.Config") -> None:
        if request.num_blocks is not None:
            from let_plugin.bench.converge import stacking

            stacking.shorten(config, request.num_blocks)

    train.main([request.config], on_built=lambda trainer: Observer(trainer, request.out).start(), on_loaded=shorten)


class Observer:
    """Notes at each evaluation what it found, and what training has taken until then; evaluations take no part in that.

    Args:
        trainer: Before its first step.
        out: Where rank 0 writes the result.
    """

    def __init__(self, trainer: "Trainer", out: str) -> None:
        from torchtitan.tools import utils

        self._trainer: Any = trainer
        self._out = out
        self._train_step = trainer.train_step
        self._validate = trainer.validator.validate
        self._device_module: Any = utils.device_module
        self._peaks: dict[str, int] = {}
        self._seconds = 0.0
        self._active_steps = 0
        self._is_evaluating = False
        self._curve: list[dict[str, float]] = []

    def start(self) -> None:
        self._trainer.train_step = self._count
        self._trainer.validator.validate = self._evaluate
        # torchtitan lets the peak start anew whenever it logs.
        monitor = self._trainer.metrics_processor.device_memory_monitor
        self._reset, monitor.reset_peak_stats = monitor.reset_peak_stats, self._note_peak
        self._reset()
        self._created = self._started = time.perf_counter()

    def _count(self, data_iterator: Iterator[Any]) -> None:
        self._train_step(data_iterator)
        self._active_steps += getattr(self._trainer, "guidance", None) is not None

    def _note_peak(self) -> None:
        if not self._is_evaluating:
            found = local_peak_memory(self._trainer.device, self._device_module)
            self._peaks = {name: max(value, self._peaks.get(name, 0)) for name, value in found.items()}
        self._reset()

    def _evaluate(self, model_parts: "list[nn.Module]", step: int) -> None:
        self._device_module.synchronize()
        self._seconds += time.perf_counter() - self._started
        self._note_peak()
        self._is_evaluating = True
        self._validate(model_parts, step)
        validation, test = self._trainer.validator.losses
        self._curve.append(
            {
                "step": step,
                "active_steps": self._active_steps,
                "seconds": self._seconds,
                "validation_loss": validation,
                "test_loss": test,
            }
        )
        if step == self._trainer.config.training.steps:
            self._write()
        self._reset()
        self._is_evaluating = False
        self._started = time.perf_counter()

    def _write(self) -> None:
        import torch

        device = self._trainer.device
        memory = largest_of_ranks(self._peaks, device)
        # With pipeline parallelism only the last stage knows the losses; the others have less than any.
        losses = [[point["validation_loss"], point["test_loss"]] for point in self._curve]
        known = torch.tensor(losses, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MAX)
        for point, (validation, test) in zip(self._curve, known.tolist(), strict=True):
            point |= {"validation_loss": validation, "test_loss": test}
        result = {
            "device_name": self._device_module.get_device_name(),
            "num_threads": torch.get_num_threads(),
            "curve": {name: [point[name] for point in self._curve] for name in self._curve[0]},
            "wall_seconds": time.perf_counter() - self._created,
            "peak_memory_bytes": memory,
            "peak_is_of_training": getattr(self._device_module, "peak_is_resettable", True),
        }
        if os.environ["RANK"] == "0":
            Path(self._out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
