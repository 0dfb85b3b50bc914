"""When to end the alignment, by what is measured on the way rather than by a step that was chosen before."""

import math
from typing import Any

import torch


class AdaptiveStop:
    """Ends the alignment when a measured value has stayed below `threshold` in `patience` measurements in a row.

    The value is the cosine between the gradients of the alignment and of the student's own loss (HASTE, arXiv
    2505.16792, stops on the like), or how far the student's held-out loss is above the teacher's. It must be the same
    on every rank. It is smoothed: `smoothing` is the weight of the past in an exponential moving average, which is
    corrected for its start at zero.
    """

    def __init__(self, *, threshold: float, smoothing: float, patience: int) -> None:
        self.stop_step: int | None = None  # the first step (0-based) without the alignment, once it is known
        self._threshold = threshold
        self._smoothing = smoothing
        self._patience = patience
        self._average = 0.0
        self._num_measured = 0
        self._num_below = 0

    def update(self, value: float, *, next_step: int) -> float:
        """Takes a measurement before step `next_step`; the smoothed value. One that is not finite does not count."""
        if not math.isfinite(value):
            return value
        self._num_measured += 1
        self._average = self._smoothing * self._average + (1 - self._smoothing) * value
        smoothed = self._average / (1 - self._smoothing**self._num_measured)
        self._num_below = self._num_below + 1 if smoothed < self._threshold else 0
        if self._num_below >= self._patience and self.stop_step is None:
            self.stop_step = next_step
        return smoothed

    # Tensors only, so that a checkpoint holds no pickled objects; fp64, so that a resumed run goes on bit for bit.

    def state_dict(self) -> dict[str, Any]:
        stop_step = -1 if self.stop_step is None else self.stop_step
        return {
            "average": torch.tensor(self._average, dtype=torch.float64),
            "counts": torch.tensor([self._num_measured, self._num_below, stop_step]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average = state_dict["average"].item()
        self._num_measured, self._num_below, stop_step = state_dict["counts"].tolist()
        self.stop_step = None if stop_step < 0 else stop_step
