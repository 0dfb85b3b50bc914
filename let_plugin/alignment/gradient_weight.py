"""A weight that means the same everywhere: lambda as a share of the student's own gradient."""

from typing import Any

import torch


class GradientWeight:
    """lambda(s) = share(s) * mean over the steps before s of |g| / |h|.

    At the deepest aligned block g is the gradient of the student's own loss and h that of the alignment loss at
    lambda = 1, so that a share of 0.3 pulls 0.3 times as hard as the student's own loss does. The mean is an
    exponential moving average, corrected for its start at zero. Nothing makes the host wait.

    Args:
        momentum: Weight of the past in the mean.
        device: Where the gradients are.

    Attributes:
        value: lambda of the current step, 0-dim fp32. Written in place.
    """

    FIRST = 1e-6  # the ratio of the first step, in which nothing is measured: too small to matter, enough to measure h

    def __init__(self, *, momentum: float, device: torch.device) -> None:
        self.value = torch.zeros((), device=device)
        self._momentum = momentum
        self._average = torch.zeros((), device=device)
        self._correction = torch.zeros((), device=device)

    def start_step(self, share: float) -> None:
        """Before a step: makes its lambda."""
        ratio = self._average / self._correction
        self.value.copy_(share * torch.where(self._correction > 0, ratio, self.FIRST))

    def finish_step(self, gradient_sums: torch.Tensor) -> None:
        """After a step, with AlignmentTap's sums <g, a>, <g, g>, <a, a> over all tokens, a = lambda h; [3]."""
        _, own, added = gradient_sums.unbind()
        is_measured = ((own > 0) & (added > 0)).float()  # not in a step without a token that counts
        ratio = self.value * (own / added).sqrt()
        weight = (1 - self._momentum) * is_measured
        self._average.lerp_(torch.where(is_measured > 0, ratio, 0), weight)
        self._correction.lerp_(torch.ones_like(weight), weight)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "correction": self._correction}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, own in self.state_dict().items():
            own.copy_(state_dict[name])
