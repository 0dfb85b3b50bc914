"""A term's weight, and when it ends: at the step that was chosen, or before it, by what is measured on the way."""

import math
from typing import Any

import torch
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.config import plan
from let_plugin.guidance.teacher_loss import measure_teacher_loss
from let_plugin.runtime import checkpoint

ADAPTIVE_STOP = "let_adaptive_stop"  # its state in a checkpoint


def ended_at(
    config: Trainer.Config, term: plan.Term, stop_step: int, resumption: checkpoint.Resumption | None
) -> int | None:
    """The step at which a term has ended by the time the run starts; None if there is some of it left.

    Needs no process group. An adaptive stop by validation may yet end it before its first step: torchtitan validates
    after it has saved, and what that measured is in no checkpoint. `stop_step` is the end that was chosen.
    """
    adaptive = plan.adaptive_stop(config.let, term)
    if resumption is not None and adaptive is not None:
        checkpoint.read(_state_name(term), adaptive, resumption.path)
        if adaptive.stop_step is not None:
            stop_step = min(stop_step, adaptive.stop_step)
    steps_taken = 0 if resumption is None else resumption.steps_taken
    return stop_step if steps_taken >= stop_step else None


def _state_name(term: plan.Term) -> str:
    return f"{ADAPTIVE_STOP}_{term.index}" if term.index else ADAPTIVE_STOP


class TermProgress:
    """How far a term has come, from the first step of the run to the last, the same on every rank.

    A part of the run's checkpoints if the stop is adaptive.

    Attributes:
        term: Which term.
        step: S_stop, the first step (0-based) without it, as far as it is known by now.
        fraction: lambda / `weight` in the current step; 0 after the end.
        teacher_loss: What the student's held-out loss is compared with, in nats per token, None until it is known.
    """

    def __init__(self, trainer: Trainer, term: plan.Term) -> None:
        dims = trainer.parallel_dims
        self.term = term
        self.step = plan.stop_step(trainer.config, term, dims.dp_replicate * dims.dp_shard)
        self.fraction = 0.0
        self._schedule = plan.schedule(term)
        self._adaptive = plan.adaptive_stop(trainer.config.let, term)
        self._settings = term.config.adaptive_stop
        self.teacher_loss = self._settings.teacher_loss
        self._trainer = trainer
        self._has_begun = False

    @property
    def weight(self) -> float:
        """lambda of the current step, where it is one of the loss (`weight_by`)."""
        return self.term.config.weight * self.fraction

    def begin(self, steps_taken: int) -> bool:
        """Before each step, and before `start_step` of any term; does its work the first time.

        Restores the state, and measures the teacher's loss if nobody knows it. Returns whether the last validation is
        to be repeated: the checkpoint was saved before it.
        """
        if self._has_begun or self._adaptive is None:
            return False
        self._has_begun = True
        has_resumed = steps_taken > 0 and self._trainer.config.checkpoint.enable
        if self._trainer.config.checkpoint.enable:
            self._trainer.checkpointer.states[_state_name(self.term)] = self
        if has_resumed:
            checkpoint.restore(_state_name(self.term), self, self._trainer.config, steps_taken)
            self._come_forward()
        if self._settings.criterion != "validation" or steps_taken >= self.step:
            return False
        if self.teacher_loss is None:
            # Now, when neither the teacher that guides nor the student's activations take any memory.
            self.teacher_loss = measure_teacher_loss(self._trainer)
            logger.info(f"LET: the teacher's own loss on the validation data is {self.teacher_loss:.4f} nats per token")
        return has_resumed and self._trainer.validator.should_validate(steps_taken)

    def start_step(self, steps_taken: int) -> bool:
        """Before each step: whether the term is active in it."""
        is_active = steps_taken < self.step
        self.fraction = self._schedule(steps_taken, stop_step=self.step) if is_active else 0.0
        return is_active

    def after_gradients(self, grad_cosine: float | None, steps_taken: int) -> None:
        """After a logged step's metrics, on every rank. None: this step has not measured it."""
        if self._settings.criterion == "gradient" and grad_cosine is not None:
            self._measured(grad_cosine, steps_taken)

    def after_validation(self, loss: float, steps_taken: int) -> None:
        """After a validation, on every rank. With pipeline parallelism only the last stage knows the loss."""
        if self._settings.criterion == "validation" and steps_taken < self.step:
            known = torch.tensor(loss, device=self._trainer.device, dtype=torch.float64)
            torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MAX)  # the others have less than any loss
            assert self.teacher_loss is not None
            self._measured(known.item() - self.teacher_loss, steps_taken)

    def state_dict(self) -> dict[str, Any]:
        assert self._adaptive is not None
        state = self._adaptive.state_dict()
        if self._settings.criterion == "validation":
            loss = math.nan if self.teacher_loss is None else self.teacher_loss
            state["teacher_loss"] = torch.tensor(loss, dtype=torch.float64)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self._adaptive is not None
        self._adaptive.load_state_dict(state_dict)
        if self.teacher_loss is None and "teacher_loss" in state_dict:
            loss = state_dict["teacher_loss"].item()
            self.teacher_loss = None if math.isnan(loss) else loss

    def _measured(self, value: float, steps_taken: int) -> None:
        assert self._adaptive is not None
        smoothed = self._adaptive.update(value, next_step=steps_taken)
        if self._adaptive.stop_step is not None:
            name = self.term.name or "the alignment"
            logger.info(f"LET: step {steps_taken}: {name} is to end, the measured value is {smoothed:.4f}")
        self._come_forward()

    def _come_forward(self) -> None:
        assert self._adaptive is not None
        if self._adaptive.stop_step is not None:
            self.step = min(self.step, self._adaptive.stop_step)
