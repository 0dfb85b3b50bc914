"""LET's numbers, through torchtitan's metrics processor to TensorBoard and W&B, and to `metrics.jsonl`."""

import json
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO

import torch
from torchtitan.components.metrics import BaseLogger

_VALIDATION_LOSS = "validation_metrics/loss"


class JsonlLogger(BaseLogger):
    """Adds LET's metrics to torchtitan's, hands them all on, and writes each logged step as one line of JSON.

    A run that resumes continues its file without the lines after its checkpoint. What is not finite is null.
    `extra_metrics`, of a logged training step, and `on_validation`, with its loss and step, are called on every rank
    (they may communicate), also where `path` is None: on the ranks that do not write.
    """

    def __init__(
        self,
        inner: BaseLogger,
        path: str | None,
        extra_metrics: Callable[[], dict[str, float]],
        on_validation: Callable[[float, int], None] = lambda loss, step: None,
    ) -> None:
        self._inner = inner
        self._extra_metrics = extra_metrics
        self._on_validation = on_validation
        self._path = path
        self._file: TextIO | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if "loss_metrics/global_avg_loss" in metrics:
            metrics = {**metrics, **self._extra_metrics()}
        elif _VALIDATION_LOSS in metrics:
            self._on_validation(metrics[_VALIDATION_LOSS], step)
        self._inner.log(metrics, step)
        if self._path is None:
            return
        if self._file is None:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            _drop_lines_from(self._path, step, is_validation=_VALIDATION_LOSS in metrics)
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
            is_before = logged["step"] == step and is_validation and _VALIDATION_LOSS not in logged
            if logged["step"] < step or is_before:
                kept.append(line)
    with open(f"{path}.new", "w") as file:
        file.writelines(kept)
    os.replace(f"{path}.new", path)


class DeviceTimer:
    """Seconds that the device spends in a region, without making the host wait for it before `pop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def __enter__(self) -> "DeviceTimer":
        if self._device.type == "cpu":
            self._started = time.perf_counter()
        else:
            start, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            start.record()
            self._events.append((start, end))
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cpu":
            self._seconds += time.perf_counter() - self._started
        else:
            self._events[-1][1].record()

    def pop(self) -> float:
        """Seconds since the last call; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class Disagreement:
    """Notices gradients that point apart, `PATIENCE` measurements in a row (HASTE, arXiv 2505.16792)."""

    PATIENCE = 5

    def __init__(self) -> None:
        self._in_a_row = 0
        self._sum = 0.0

    def advice(self, grad_cosine: float | None) -> str | None:
        """What to tell the user after a measurement (None: there was none), once; None if there is nothing to say."""
        if grad_cosine is None or self._in_a_row == self.PATIENCE:
            return None
        self._in_a_row, self._sum = (self._in_a_row + 1, self._sum + grad_cosine) if grad_cosine < 0 else (0, 0.0)
        if self._in_a_row < self.PATIENCE:
            return None
        return (
            f"the teacher works against the student: in the last {self.PATIENCE} measurements the gradient of the "
            f"alignment pointed away from that of the student's loss (mean cosine {self._sum / self.PATIENCE:.3f}). "
            "Stop the alignment earlier (let.stop_step), lower let.weight, or take another teacher"
        )


class Progress:
    """Time to the end of the run, from the pace since the last logged step."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._last: tuple[int, float] | None = None

    def eta(self, step: int) -> str:
        """`h:mm:ss` until the last step when `step` steps are done; a dash until the pace is known."""
        now = time.monotonic()
        last, self._last = self._last, (step, now)
        if last is None or step <= last[0]:
            return "-"
        return str(timedelta(seconds=round((now - last[1]) / (step - last[0]) * (self._total_steps - step))))
