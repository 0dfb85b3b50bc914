"""The state of a dimension match that is fitted, in closed form, to what both models make of the tokens of some steps.

The sum over tokens of the outer products of the two states is all that such a fit needs. It adds up over microbatches
and ranks, so no token has to travel, and every rank fits the same weight. That is replicated, and in no state dict of
the student; it has a place of its own in the run's checkpoint.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from let_plugin.alignment.projectors import FittedMatch
from let_plugin.guidance.learned import PROJECTOR, dense_parameter, sum_placements


class FittedProjector:
    """Refits a match on the tokens of every `match.refit_every`-th step, for the steps after it.

    Args:
        match: The match, on this rank's device. Its weight is written in place.
        part: The student, or the pipeline part of it that holds the aligned block.
        block: Name of that block in `part.layers`.
        index: Number of its pair.
        side: Whose states the match maps.
        sequence_parallel: Whether tensor-parallel ranks hold different parts of the sequence.
    """

    def __init__(
        self, match: FittedMatch, part: nn.Module, block: str, *, index: int, side: str, sequence_parallel: bool
    ) -> None:
        self.name = f"{PROJECTOR}_{index}"
        self._match = match
        self._part = part
        self._side = side
        self._refits = False
        self._like = dense_parameter(part.get_submodule(f"layers.{block}"))
        self._sum_placements = sum_placements(self._like, sequence_parallel)
        # A buffer of the part: a pipeline's trial run puts it back (see AlignmentTap).
        part.register_buffer(self.name, torch.zeros_like(match.weight), persistent=False)

    def start_step(self, step: int) -> None:
        """Before step `step` (0-based)."""
        self._refits = step % self._match.refit_every == 0
        if self._refits:
            self._part.get_buffer(self.name).zero_()

    def observe(self, student_BLD: torch.Tensor, teacher_BLE: torch.Tensor) -> None:
        """Takes one microbatch's states of this rank's tokens; a token that does not count has a state of zeros."""
        if not self._refits:
            return
        student, teacher = (states.flatten(0, 1).float() for states in (student_BLD, teacher_BLE))
        given, wanted = (teacher, student) if self._side == "teacher" else (student, teacher)
        self._part.get_buffer(self.name).addmm_(wanted.T, given)

    def reduce(self) -> None:
        """After the last microbatch: sums over the ranks."""
        if self._refits and isinstance(self._like, DTensor):
            products = self._part.get_buffer(self.name)
            partial = DTensor.from_local(products, self._like.device_mesh, self._sum_placements, run_check=False)
            products.copy_(partial.full_tensor())

    def finish_step(self) -> None:
        """Fits the weight, for the next step on."""
        if self._refits:
            self._match.weight.copy_(self._match.fit(self._part.get_buffer(self.name)))

    def remove(self) -> None:
        """Nothing of it is left on the student."""
        delattr(self._part, self.name)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._match.weight.detach()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            self._match.weight.copy_(state_dict["weight"])
