"""Running means over the steps that have ended: of a stream of states, and of the sizes of two gradients."""

from typing import Any

import torch


class RunningMean:
    """Exponential moving average of the mean state of each step, corrected for its start at zero; fp32.

    No token's target depends on its own batch. A step without a token of a channel leaves that channel's mean as it is.

    Shape legend: B batch, L sequence, C all channels, E those of one call. `momentum` is the weight of the past.

    Attributes:
        mean_C: The mean over the steps that have ended; zeros before the first. Written in place.
        sums: Each channel's sum over the step's tokens, and their number, [2, C]; to be reduced before `finish_step`.
    """

    def __init__(self, width: int, *, momentum: float, device: torch.device) -> None:
        self.mean_C = torch.zeros(width, device=device)
        self.sums = torch.zeros(2, width, device=device)
        self._momentum = momentum
        self._average_C = torch.zeros(width, device=device)
        self._correction_C = torch.zeros(width, device=device)

    def add(self, states_BLE: torch.Tensor, counts_BL: torch.Tensor, channels_E: torch.Tensor) -> None:
        """Takes the tokens that `counts_BL` (bool) marks; `channels_E` says which of the C channels theirs are."""
        self.sums[0].index_add_(0, channels_E, (states_BLE.float() * counts_BL[..., None]).sum(dim=(0, 1)))
        self.sums[1].index_add_(0, channels_E, counts_BL.sum().float().expand(len(channels_E)))

    def finish_step(self) -> None:
        """Ends a step, whose `sums` are those of all ranks by now. The host does not wait."""
        weight_C = (1 - self._momentum) * (self.sums[1] > 0)
        self._average_C.lerp_(self.sums[0] / self.sums[1].clamp_min(1), weight_C)
        self._correction_C.lerp_(torch.ones_like(weight_C), weight_C)
        torch.div(self._average_C, self._correction_C.clamp_min(torch.finfo(torch.float32).tiny), out=self.mean_C)
        self.sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean_C, "average": self._average_C, "correction": self._correction_C}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, own in self.state_dict().items():
            own.copy_(state_dict[name])


class GradientWeight:
    """lambda(s) = share(s) * mean over the steps before s of |g| / |h|.

    At the deepest aligned block g is the gradient of the student's own loss and h that of the alignment loss at
    lambda = 1, so that a share of 0.3 pulls 0.3 times as hard as the student's own loss does. Nothing makes the host
    wait. `momentum` is the weight of the past in the mean.

    Attributes:
        value: lambda of the current step, 0-dim fp32. Written in place.
    """

    FIRST = 1e-6  # the ratio of the first step, in which nothing is measured: too small to matter, enough to measure h

    def __init__(self, *, momentum: float, device: torch.device) -> None:
        self.value = torch.zeros((), device=device)
        self._ratio = RunningMean(1, momentum=momentum, device=device)
        self.state_dict, self.load_state_dict = self._ratio.state_dict, self._ratio.load_state_dict

    def start_step(self, share: float) -> None:
        """Before a step: makes its lambda."""
        (ratio,) = self._ratio.mean_C
        self.value.copy_(share * torch.where(ratio > 0, ratio, self.FIRST))

    def finish_step(self, gradient_sums: torch.Tensor) -> None:
        """After a step, with a tap's sums <g, a>, <g, g>, <a, a> over all tokens, a = lambda h; [3]."""
        _, own, added = gradient_sums.unbind()
        is_measured = (own > 0) & (added > 0)  # not in a step without a token that counts
        ratio = torch.where(is_measured, self.value * (own / added).sqrt(), 0)
        self._ratio.sums.copy_(torch.stack([ratio, is_measured])[:, None])
        self._ratio.finish_step()
