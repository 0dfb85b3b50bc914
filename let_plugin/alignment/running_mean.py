"""The running mean of a stream of states, over steps that have ended: no token's target depends on its own batch."""

from typing import Any

import torch


class RunningMean:
    """Exponential moving average of the mean state of each step, corrected for its start at zero; fp32.

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
        self._correction = torch.zeros((), device=device)

    def add(self, states_BLE: torch.Tensor, counts_BL: torch.Tensor, channels_E: torch.Tensor) -> None:
        """Takes the tokens that `counts_BL` (bool) marks; `channels_E` says which of the C channels theirs are."""
        self.sums[0].index_add_(0, channels_E, (states_BLE.float() * counts_BL[..., None]).sum(dim=(0, 1)))
        self.sums[1].index_add_(0, channels_E, counts_BL.sum().float().expand(len(channels_E)))

    def finish_step(self) -> None:
        """Ends a step, whose `sums` are those of all ranks by now. The host does not wait."""
        self._average_C.lerp_(self.sums[0] / self.sums[1].clamp_min(1), 1 - self._momentum)
        self._correction.lerp_(torch.ones_like(self._correction), 1 - self._momentum)
        torch.div(self._average_C, self._correction, out=self.mean_C)
        self.sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean_C, "average": self._average_C, "correction": self._correction}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, own in self.state_dict().items():
            own.copy_(state_dict[name])
