"""When the alignment ends: at the step that was chosen, or before it, by what is measured on the way."""

import torch
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin import checkpoint, plan

# Name of the adaptive stop's state in a checkpoint.
ADAPTIVE_STOP = "let_adaptive_stop"


def ended_at(config: Trainer.Config, stop_step: int, resumption: checkpoint.Resumption | None) -> int | None:
    """The step at which the alignment has ended by the time the run starts; None if there is some of it left.

    Needs no process group. An adaptive stop by validation may yet end it before its first step: torchtitan validates
    after it has saved, and what that measured is in no checkpoint.

    Args:
        config: The student's configuration.
        stop_step: The end that was chosen.
        resumption: The checkpoint that the run goes on from.
    """
    adaptive = plan.adaptive_stop(config.let)
    if resumption is not None and adaptive is not None:
        checkpoint.read(ADAPTIVE_STOP, adaptive, resumption.path)
        if adaptive.stop_step is not None:
            stop_step = min(stop_step, adaptive.stop_step)
    steps_taken = 0 if resumption is None else resumption.steps_taken
    return stop_step if steps_taken >= stop_step else None


class Stopping:
    """S_stop of a run, the same on every rank.

    Args:
        trainer: The student's trainer; its `let` table says what to go by.

    Attributes:
        step: The first step (0-based) without the alignment, as far as it is known by now.
    """

    def __init__(self, trainer: Trainer) -> None:
        dims = trainer.parallel_dims
        self.step = plan.stop_step(trainer.config, dims.dp_replicate * dims.dp_shard)
        self._adaptive = plan.adaptive_stop(trainer.config.let)
        self._settings = trainer.config.let.adaptive_stop
        self._trainer = trainer
        self._is_restored = self._adaptive is None or not trainer.config.checkpoint.enable

    def restore(self, steps_taken: int) -> None:
        """Before each step; before the first one of this process, reads what the run's checkpoint knows."""
        if self._is_restored:
            return
        self._is_restored = True
        self._trainer.checkpointer.states[ADAPTIVE_STOP] = self._adaptive
        if steps_taken > 0:
            checkpoint.restore(ADAPTIVE_STOP, self._adaptive, self._trainer.config, steps_taken)
            self._come_forward()
            validator = self._trainer.validator if self._settings.criterion == "validation" else None
            if validator is not None and validator.should_validate(steps_taken):
                # torchtitan validates after it has saved: what that measured is in no checkpoint.
                validator.validate(self._trainer.model_parts, steps_taken)

    def after_gradients(self, grad_cosine: float | None, steps_taken: int) -> None:
        """After a logged step's metrics, on every rank. None: this step has not measured it."""
        if self._settings.criterion == "gradient" and grad_cosine is not None:
            self._measured(grad_cosine, steps_taken)

    def after_validation(self, loss: float, steps_taken: int) -> None:
        """After a validation, on every rank. With pipeline parallelism only the last stage knows the loss."""
        if self._settings.criterion == "validation" and steps_taken < self.step:
            known = torch.tensor(loss, device=self._trainer.device, dtype=torch.float64)
            torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MAX)  # the others have less than any loss
            assert self._settings.teacher_loss is not None
            self._measured(known.item() - self._settings.teacher_loss, steps_taken)

    def _measured(self, value: float, steps_taken: int) -> None:
        assert self._adaptive is not None
        smoothed = self._adaptive.update(value, next_step=steps_taken)
        if self._adaptive.stop_step is not None:
            logger.info(
                f"LET: step {steps_taken}: the alignment is to end, {self._settings.criterion} criterion at "
                f"{smoothed:.4f}"
            )
        self._come_forward()

    def _come_forward(self) -> None:
        assert self._adaptive is not None
        if self._adaptive.stop_step is not None:
            self.step = min(self.step, self._adaptive.stop_step)
