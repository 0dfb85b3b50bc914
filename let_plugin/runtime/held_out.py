"""Validation on two splits at once: one for choices (validation) and one for results (test)."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from torch import nn
from torchtitan.components.validate import Validator

from let_plugin.runtime.upstream import BaseDataLoader, HuggingFaceTextDataLoader

TEST_LOSS = "test_metrics/loss"


class TwoSplitValidator(Validator):
    """torchtitan's validator, run on the validation split and then on the test split.

    `losses` are those of the last call, in nats per valid token. As with torchtitan's own validator, only the ranks of
    a pipeline's last stage know them.
    """

    dl_config: Any
    metrics_processor: Any

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        test: BaseDataLoader.Config = field(
            default_factory=lambda: HuggingFaceTextDataLoader.Config(dataset="c4_validation", infinite=False)
        )
        """Data loader of the test split; as many steps of it are taken as of the validation split."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._test: Any = replace(config.test, infinite=config.steps != -1)  # as torchtitan does for its own
        self.losses: tuple[float, float] | None = None

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        validation = self._loss(self.dl_config, model_parts, step)
        test = self._loss(self._test, model_parts, step)
        self.losses = validation, test
        self.metrics_processor.log_validation(loss=validation, step=step, extra_metrics={TEST_LOSS: test})

    def _loss(self, split: Any, model_parts: list[nn.Module], step: int) -> float:
        """torchtitan's own validation on a split, which logs nothing."""
        catcher: Any = SimpleNamespace(ntokens_since_last_log=0)  # in the metrics processor's place, to keep the loss
        catcher.log_validation = lambda **said: vars(catcher).update(said)
        own_split, processor = self.dl_config, self.metrics_processor
        self.dl_config, self.metrics_processor = split, catcher
        try:
            super().validate(model_parts, step)
        finally:
            self.dl_config, self.metrics_processor = own_split, processor
        processor.ntokens_since_last_log += catcher.ntokens_since_last_log
        return catcher.loss
