"""Where the teacher's states of a batch come from.

Shape legend: B batch (this rank's rows), L sequence, E teacher width: the sum over the layers that are asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from let_plugin.runtime.batch_extras import MakeExtras
from let_plugin.teacher.base import Teacher


class States(NamedTuple):
    """The teacher's states of the student's tokens.

    Attributes:
        states_BLE: In the teacher's dtype. What is there for a token that has no state is not looked at.
        known_BL: Which tokens have one, bool; None: all.
        num_tokens: How many tokens the teacher has run on.
    """

    states_BLE: torch.Tensor
    known_BL: torch.Tensor | None
    num_tokens: int


class StateProvider(ABC):
    """Makes or finds the states of a batch.

    Attributes:
        make_extras: What the data loader is to add to each batch for it; None: nothing.
        teacher: The teacher, if there is one in this process.
    """

    make_extras: MakeExtras | None = None
    teacher: Teacher | None = None

    def start_step(self, step: int) -> None:  # noqa: B027
        """Before the first microbatch of step `step` (0-based)."""

    @abstractmethod
    def states(self, batch: Mapping[str, torch.Tensor], student_masks: Any = None) -> States:
        """The states of all tokens of "input".

        Args:
            batch: "input", token ids [B, L]; for packed documents "positions" [B, L]; and what `make_extras` has
                added, by its own names. On the device; whole sequences; only the rows of this rank's share.
            student_masks: As in Teacher.forward.
        """


class OnlineStates(StateProvider):
    """The teacher runs on the student's tokens."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def states(self, batch: Mapping[str, torch.Tensor], student_masks: Any = None) -> States:
        tokens_BL = batch["input"]
        assert self.teacher is not None
        return States(self.teacher(tokens_BL, batch.get("positions"), student_masks), None, tokens_BL.numel())
