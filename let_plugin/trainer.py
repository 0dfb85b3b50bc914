"""The trainer: torchtitan's, whichever one the configuration brings, with LET wired in.

Nothing here is maths. Each override does LET's part and ends in `super()`; from the stop step on there is nothing left
of LET, and a step runs the same code as plain torchtitan.
"""

import functools
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.config import LetConfig, RuntimeConfig, plan
from let_plugin.guidance.guidance import Guidance
from let_plugin.guidance.initialization import initialize
from let_plugin.guidance.metrics import VALIDATION_LOSS, JsonlLogger, StepLines
from let_plugin.guidance.signals import Signal
from let_plugin.guidance.stopping import TermProgress
from let_plugin.runtime import upstream
from let_plugin.runtime.batch_extras import take_extras
from let_plugin.runtime.console import STEPS
from let_plugin.runtime.ending import CleanEnd

# A mixin's attributes and `super()` calls are those of the trainer that it is mixed into.
_Base: Any = Trainer if TYPE_CHECKING else object

_PATIENCE = 5  # measurements in a row of gradients that point apart (HASTE, arXiv 2505.16792), until the run says so
_ADVICE = (
    "the teacher works against the student: the gradient of the alignment has lastingly pointed away from that of the "
    "student's loss. Stop the alignment earlier (let.stop_step), lower let.weight, or take another teacher"
)


class LetTrainerMixin(_Base):
    """Late-to-Early Training for any subclass of torchtitan's Trainer.

    `guidance` is what exists only while a term of the loss is active; None before the first step and after their end.
    """

    def __init__(self, config: Any) -> None:
        keeps_them = config.training.disable_cuda_graphs or config.let.cuda_graphs
        self._waiting_for_graphs = config.let.enable and not keeps_them
        if self._waiting_for_graphs:
            logger.info("LET: CUDA graphs are off until the alignment has ended (let.cuda_graphs keeps them)")
            config.training.disable_cuda_graphs = True
        super().__init__(config)
        self.let: LetConfig = config.let
        self.terms = [TermProgress(self, term) for term in plan.terms(self.let)] if self.let.enable else []
        self.guidance: Guidance | None = None
        self._logs = upstream.logs_on_this_rank(self)
        self._step_lines = StepLines(config.training.steps, [progress.term for progress in self.terms])
        self._disagreements = [AdaptiveStop(threshold=0, smoothing=0, patience=_PATIENCE) for _ in self.terms]
        self._clean_end = CleanEnd(self)

        path = os.path.join(config.dump_folder, "metrics.jsonl") if self._logs else None
        processor = self.metrics_processor
        processor.logger = JsonlLogger(processor.logger, path, self._metrics, self._after_logging)
        initialize(self)

    def train(self) -> None:
        with self._clean_end:
            super().train()

    def train_step(self, data_iterator: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> None:
        self._start_step(steps_taken=self.step - 1)  # torchtitan counts the step that is about to be taken

        super().train_step(data_iterator if self.guidance is None else self.guidance.counted(data_iterator))

        if self.guidance is not None:
            self.guidance.finish_step()
        self._clean_end.after_step()

    def _start_step(self, steps_taken: int) -> None:
        repeats = [progress.begin(steps_taken) for progress in self.terms]
        if any(repeats):  # now that all terms have begun, for all of them hear of it
            self.validator.validate(self.model_parts, steps_taken)
        active = [progress for progress in self.terms if progress.start_step(steps_taken)]
        if self.guidance is None and active:
            # Here rather than in __init__: only now is a restored step known, and a run that resumes after the stop
            # step needs no teacher.
            self.guidance = Guidance(self, active, steps_taken)
        if self.guidance is not None and len(active) < len(self.guidance.signals):
            self._end_alignment([signal for signal in self.guidance.signals if signal.progress not in active])
        if self.guidance is not None:
            self.guidance.start_step(measures=self._measures())
        elif self._waiting_for_graphs:
            self._waiting_for_graphs = self.config.training.disable_cuda_graphs = False
            upstream.recapture_cuda_graph(self)

    def forward_backward_step(self, *, global_valid_tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.guidance is None:
            return super().forward_backward_step(global_valid_tokens=global_valid_tokens, **kwargs)
        with self.guidance.microbatches(global_valid_tokens):
            return super().forward_backward_step(global_valid_tokens=global_valid_tokens, **kwargs)

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        # Taken out in any case: after the stop, a data loader's workers still hold some ready.
        extras = take_extras(input_dict)
        inputs, own_labels, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        if self.guidance is not None:
            # The whole sequences, as the data loader made them, and not what torchtitan has cut for this rank.
            extra_kwargs |= self.guidance.targets(input_dict, labels, extras, extra_kwargs.get("attention_masks"))
        return inputs, own_labels, extra_kwargs

    def _measures(self) -> bool:
        """Whether the step that is about to be taken compares gradients."""
        freq = self.let.diagnosis_freq
        if not self.config.training.disable_cuda_graphs:
            return freq > 0  # a captured step does the same each time
        return freq > 0 and self.metrics_processor.should_log(self.step) and (self.step == 1 or self.step % freq == 0)

    def _end_alignment(self, signals: list[Signal]) -> None:
        """Of these terms; of all, it takes the teacher along."""
        assert self.guidance is not None
        names = ", ".join(signal.term.name for signal in signals)
        self.guidance.end(signals)
        signals.clear()  # or their teacher would outlive the collection below
        if is_last := not self.guidance.signals:
            self.guidance = None
        if not self.config.training.disable_cuda_graphs:
            # The captured step has the tap in it, and an input that is no longer there.
            upstream.recapture_cuda_graph(self)
        gc.collect()  # torchtitan has switched off the automatic collection; FSDP's modules are in cycles
        utils.device_module.empty_cache()
        ended = "the alignment has ended and the teacher is freed" if is_last else f"{names} has ended"
        logger.info(f"LET: step {self.step}: {ended}")

    def _after_logging(self, metrics: dict[str, Any], step: int) -> None:
        """After a logged step or a validation, on every rank."""
        if self._logs and self.config.runtime.log == "plain":  # else torchtitan has said it
            self._step_lines.say(metrics, step)
        if VALIDATION_LOSS in metrics:
            for progress in self.terms:
                progress.after_validation(metrics[VALIDATION_LOSS], step)

    def _metrics(self) -> dict[str, float]:
        if not self.let.enable:
            return {}
        metrics = {progress.term.metric("lambda"): progress.weight for progress in self.terms}
        metrics |= {"let/active": float(self.guidance is not None)}
        if self.guidance is not None:
            metrics |= self.guidance.metrics()
            for progress, disagreement in zip(self.terms, self._disagreements, strict=True):
                grad_cosine = metrics.get(progress.term.metric("grad_cosine"))
                progress.after_gradients(grad_cosine, self.step)
                if grad_cosine is not None and disagreement.stop_step is None:
                    disagreement.update(grad_cosine, next_step=self.step)
                    if disagreement.stop_step is not None and self._logs:
                        STEPS.warning(f"LET: step {self.step}: {_ADVICE}")
        return metrics


@functools.cache  # one class per base, so that two configurations of one kind compare equal
def _let_config_class(base: type[Trainer.Config]) -> type[Trainer.Config]:
    """`base` with the fields `let` and `runtime`, owned by its trainer with LET mixed in."""
    trainer = base._owner
    assert trainer is not None and issubclass(trainer, Trainer)

    @dataclass(kw_only=True, slots=True)
    class Config(base):
        let: LetConfig = field(default_factory=LetConfig)
        runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    # Made by `type` for its name: logs and error messages say LetTrainer, LetFluxTrainer, ...
    namespace = {"Config": Config, "__module__": __name__}
    let_trainer: Any = type(f"Let{trainer.__name__}", (LetTrainerMixin, trainer), namespace)
    return let_trainer.Config


def with_let(config: Trainer.Config) -> Trainer.Config:
    """The same configuration with a `let` and a `runtime` table; it builds the same trainer with LET mixed in."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return _let_config_class(type(config))(**values)  # type: ignore[arg-type]
