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
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import _get_metrics_rank
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin import plan
from let_plugin.alignment.tap import TARGET_KWARG, AlignmentTap
from let_plugin.config import LetConfig, RuntimeConfig
from let_plugin.metrics import DeviceTimer, JsonlLogger, Progress
from let_plugin.teacher.base import Teacher
from let_plugin.teacher.sources import open_teacher

# A mixin's attributes and `super()` calls are those of the trainer that it is mixed into.
_Base: Any = Trainer if TYPE_CHECKING else object


class LetTrainerMixin(_Base):
    """Late-to-Early Training for any subclass of torchtitan's Trainer."""

    def __init__(self, config: Any) -> None:
        if config.let.enable and not config.let.cuda_graphs and not config.training.disable_cuda_graphs:
            logger.info("LET: CUDA graphs are off while no run has shown them to be right (let.cuda_graphs)")
            config.training.disable_cuda_graphs = True
        super().__init__(config)
        self.let: LetConfig = config.let
        if self.let.enable:
            self.stop_step = plan.stop_step(config)
            self.schedule = plan.schedule(self.let)
        self.teacher: Teacher | None = None
        self.tap: AlignmentTap | None = None
        self._teacher_timer = DeviceTimer(self.device)
        self._teacher_tokens = 0
        self._lambda = 0.0
        self._valid_tokens = torch.ones((), device=self.device)
        self._logged_metrics: dict[str, float] = {}
        self._progress = Progress(config.training.steps)

        metrics_rank = _get_metrics_rank(
            parallel_dims=self.parallel_dims, pp_schedule=config.parallelism.pipeline_parallel_schedule
        )
        logs = torch.distributed.get_rank() == metrics_rank
        self.metrics_processor.logger = JsonlLogger(
            self.metrics_processor.logger,
            os.path.join(config.dump_folder, "metrics.jsonl") if logs else None,
            self._metrics,
        )

    def train_step(self, data_iterator: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> None:
        steps_taken = self.step - 1  # torchtitan counts the step that is about to be taken
        if self.let.enable:
            self._lambda = self.let.weight * self.schedule(steps_taken, stop_step=self.stop_step)
            if steps_taken < self.stop_step:
                # Here rather than in __init__: only now is a restored step known, and a run that resumes after the
                # stop step needs no teacher.
                if self.tap is None:
                    self._attach()
                assert self.tap is not None
                self.tap.reset()
            elif self.tap is not None:
                self._detach()

        super().train_step(data_iterator)

        if self.tap is not None and self.tap.num_calls == 0:
            raise RuntimeError("LET: the tap was not reached in a training step; its block's forward hook did not run")
        if self.metrics_processor.should_log(self.step):
            self._print_progress()

    def forward_backward_step(self, *, global_valid_tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.tap is not None:
            self.tap.coefficient.fill_(self._lambda).div_(global_valid_tokens)
            self._valid_tokens = global_valid_tokens
        return super().forward_backward_step(global_valid_tokens=global_valid_tokens, **kwargs)

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        inputs, labels, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        if self.teacher is not None:
            with torch.no_grad(), self.train_context(), self._teacher_timer:
                target_BLE = self.teacher(inputs, extra_kwargs.get("positions"))
                # A target of zeros has cosine 0 and gradient 0: tokens that do not count in the loss need no mask.
                target_BLE = target_BLE.masked_fill((labels == IGNORE_INDEX).unsqueeze(-1), 0)
            self._teacher_tokens += labels.numel()
            extra_kwargs[TARGET_KWARG] = target_BLE
        return inputs, labels, extra_kwargs

    def _attach(self) -> None:
        source = open_teacher(self.let.teacher)
        pair = plan.layer_pair(self.config, source.info)
        self.teacher = source.build(
            dtype=plan.teacher_dtype(self.config),
            device=self.device,
            config=self.config,
            parallel_dims=self.parallel_dims,
        )
        self.tap = AlignmentTap(
            self.model_parts[0], str(pair.student), plan.alignment(self.let, self.config.compile), self.device
        )

    def _detach(self) -> None:
        assert self.tap is not None
        self.tap.remove()
        self.tap = self.teacher = None
        gc.collect()  # torchtitan has switched off the automatic collection; FSDP's modules are in cycles
        utils.device_module.empty_cache()
        logger.info(f"LET: step {self.step}: the alignment has ended and the teacher is freed")

    def _metrics(self) -> dict[str, float]:
        if not self.let.enable:
            return {}
        metrics = {"let/active": float(self.tap is not None), "let/lambda": self._lambda}
        if self.tap is not None:
            mesh = self.parallel_dims.get_optional_mesh("loss") if self.parallel_dims.dp_cp_enabled else None
            seconds = self._teacher_timer.pop()
            metrics["let/cosine"] = dist_utils.dist_sum(self.tap.cosine_sum / self._valid_tokens, mesh)
            metrics["let/teacher_tokens_per_second"] = self._teacher_tokens / seconds
            self._teacher_tokens = 0
        self._logged_metrics = metrics
        return metrics

    def _print_progress(self) -> None:
        parts = [f"step {self.step}/{self.config.training.steps}", f"eta {self._progress.eta(self.step)}"]
        metrics = self._logged_metrics
        if "let/cosine" in metrics:
            parts += [
                f"lambda {metrics['let/lambda']:.4g}",
                f"cosine {metrics['let/cosine']:.4f}",
                f"teacher {metrics['let/teacher_tokens_per_second']:,.0f} tokens/s",
            ]
        elif self.let.enable:
            parts.append("alignment ended")
        logger.info(f"LET: {'  '.join(parts)}" if self.let.enable else "  ".join(parts))


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
