"""LET's numbers, through torchtitan's metrics processor to TensorBoard and W&B, `metrics.jsonl` and the console."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TextIO

import torch
from torchtitan.components.metrics import BaseLogger

from let_plugin.config.plan import Term
from let_plugin.guidance.signals import METRIC_OF_SIGNAL
from let_plugin.runtime.console import STEPS
from let_plugin.runtime.held_out import TEST_LOSS

LOSS, VALIDATION_LOSS = "loss_metrics/global_avg_loss", "validation_metrics/loss"
# What the console says of a logged step or a validation.
_SHOWN = {
    LOSS: "loss {:.4f}",
    VALIDATION_LOSS: "validation loss {:.4f}",
    TEST_LOSS: "test loss {:.4f}",
    "grad_norm": "grad norm {:<5.3g}",
    "throughput(tps)": "{:,.0f} tokens/s{}",
    "memory/max_reserved(GiB)": "{:.2f} GiB",
}


class JsonlLogger(BaseLogger):
    """Adds LET's metrics to torchtitan's, hands them all on, and writes each logged step as one line of JSON.

    A run that resumes continues its file without the lines after its checkpoint; one that begins anew leaves the file
    of the run before it, under another name. What is not finite is null. `extra_metrics`, of a logged training step,
    and `on_logged`, with all metrics of a step or a validation and the step, are called on every rank (they may
    communicate), also where `path` is None: on the ranks that do not write. `logged`: the last training step's metrics.
    """

    def __init__(
        self,
        inner: BaseLogger,
        path: str | None,
        extra_metrics: Callable[[], dict[str, float]],
        on_logged: Callable[[dict[str, Any], int], None] = lambda metrics, step: None,
    ) -> None:
        self.logged: dict[str, Any] = {}
        self._inner = inner
        self._extra_metrics = extra_metrics
        self._on_logged = on_logged
        self._path = path
        self._file: TextIO | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if LOSS in metrics:
            self.logged = metrics = {**metrics, **self._extra_metrics()}
        self._inner.log(metrics, step)
        self._on_logged(metrics, step)
        if self._path is None:
            return
        if self._file is None:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            _drop_lines_from(self._path, step, is_validation=VALIDATION_LOSS in metrics)
            self._file = open(self._path, "a", buffering=1)  # noqa: SIM115  # a killed run keeps what it logged
        line = {"step": step, "time": time.time(), **metrics}
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        self._inner.close()
        if self._file is not None:
            self._file.close()


def _drop_lines_from(path: str, step: int, *, is_validation: bool) -> None:
    """Drops what is about to be logged again. A validation follows the training line of its step, which stays."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as file:
        for line in file:
            try:
                logged = json.loads(line)
            except ValueError:
                continue  # cut off when the run was killed
            is_before = logged["step"] == step and is_validation and VALIDATION_LOSS not in logged
            if logged["step"] < step or is_before:
                kept.append(line)
    if not kept:
        older = time.strftime("metrics-%Y%m%d-%H%M%S.jsonl", time.localtime(os.path.getmtime(path)))
        os.replace(path, os.path.join(os.path.dirname(path), older))
        STEPS.info(f"LET: {path} was that of an earlier run, and is {older} now")
        return
    with open(f"{path}.new", "w") as file:
        file.writelines(kept)
    os.replace(f"{path}.new", path)


class DeviceTimer:
    """Marks the device's time at the ends of regions, without making the host wait for it before `pop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Notes the time; on an accelerator by an event on its stream."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            self._marks.append(torch.Event(self._device, enable_timing=True))
            self._marks[-1].record()

    __enter__ = mark

    def __exit__(self, *_: object) -> None:
        self.mark()

    def pop(self) -> list[float]:
        """Seconds of each region since the last call; waits for the device."""
        regions = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks = []
        if self._device.type == "cpu":
            return [end - start for start, end in regions]
        if regions:
            regions[-1][1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in regions]


class StepLines:
    """What the console says of each logged step and each validation, in one line."""

    def __init__(self, num_steps: int, terms: Sequence[Term]) -> None:
        self._num_steps, self._terms = num_steps, terms
        self._per_rank = " per rank" if torch.distributed.get_world_size() > 1 else ""  # as in metrics.jsonl
        self._last: tuple[int, float] | None = None

    def say(self, metrics: Mapping[str, Any], step: int) -> None:
        parts = [form.format(metrics[key], self._per_rank) for key, form in _SHOWN.items() if key in metrics]
        if LOSS in metrics:
            parts = [parts[0], *self._of_terms(metrics), *parts[1:], f"eta {self.eta(step)}"]
        STEPS.info("  ".join([f"step {step:{len(str(self._num_steps))}}/{self._num_steps}", *parts]))

    def _of_terms(self, metrics: Mapping[str, float]) -> list[str]:
        """Of each term its weight and what it measures, or that it has ended."""
        said = []
        for term in self._terms:
            name = METRIC_OF_SIGNAL[term.config.signal]
            if (value := metrics.get(term.metric(name))) is None:
                said.append(f"{term.name or 'LET'} ended")
            else:
                weight = f"{term.name or 'lambda'} {metrics[term.metric('lambda')]:<6.4g}"
                said.append(f"{weight}  {name.replace('_', ' ')} {value: .4f}")
        return said

    def eta(self, step: int) -> str:
        """`h:mm:ss` until the last step, at the pace since the last logged one; a dash until the pace is known."""
        now = time.monotonic()
        last, self._last = self._last, (step, now)
        if last is None or step <= last[0]:
            return "-"
        return str(timedelta(seconds=round((now - last[1]) / (step - last[0]) * (self._num_steps - step))))
