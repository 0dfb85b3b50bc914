"""What a run of a convergence suite does at each evaluation: its losses, and the time and memory of training."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import nn
from torchtitan.components.validate import Validator
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from let_plugin.bench.throughput import measure
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime.held_out import TwoSplitValidator


def add_test_split(config: Trainer.Config, dataset: str, path: str) -> None:
    """Makes a run evaluate a test split as well, which is read as its validation split is. In place."""
    validator: Any = config.validator
    loader = validator.dataloader
    if type(validator) not in (Validator.Config, TwoSplitValidator.Config) or not hasattr(loader, "dataset_path"):
        message = "--test-dataset needs torchtitan's own validator and text; else set a TwoSplitValidator yourself"
        raise ConfigError(Problem("validator", message))
    values = {field.name: getattr(validator, field.name) for field in fields(validator)}
    test = replace(loader, dataset=dataset, dataset_path=path or None)
    config.validator = TwoSplitValidator.Config(**values | {"test": test})


class Observer:
    """Notes at each evaluation its losses, and what training has taken until then, evaluations left out.

    `trainer` has a TwoSplitValidator. Rank 0 writes the result to `out`, after the evaluation at the last step.
    """

    def __init__(self, trainer: Trainer, out: str) -> None:
        self._trainer, self._out = cast(Any, trainer), out
        self._device_module: Any = utils.device_module
        self._peaks: dict[str, int] = {}
        self._seconds, self._active_steps = 0.0, 0
        self._curve: defaultdict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        trainer = self._trainer
        self._train_step, trainer.train_step = trainer.train_step, self._count
        self._validate, trainer.validator.validate = trainer.validator.validate, self._evaluate
        # torchtitan resets the peak whenever it logs. Here it is that of all steps between two evaluations.
        trainer.metrics_processor.device_memory_monitor.reset_peak_stats = lambda: None
        self._device_module.reset_peak_memory_stats()
        self._created = self._started = time.perf_counter()

    def _count(self, data_iterator: Iterator[Any]) -> None:
        self._train_step(data_iterator)
        self._active_steps += getattr(self._trainer, "guidance", None) is not None

    def _evaluate(self, model_parts: list[nn.Module], step: int) -> None:
        self._device_module.synchronize()
        self._seconds += time.perf_counter() - self._started
        found = measure.local_peak_memory(self._trainer.device)
        self._peaks = {name: max(value, self._peaks.get(name, 0)) for name, value in found.items()}
        self._validate(model_parts, step)
        validation, test = self._trainer.validator.losses
        point = {"step": step, "active_steps": self._active_steps, "seconds": self._seconds}
        for name, value in (point | {"validation_loss": validation, "test_loss": test}).items():
            self._curve[name].append(value)
        if step == self._trainer.config.training.steps:
            self._write()
        self._device_module.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def _write(self) -> None:
        device = self._trainer.device
        # With pipeline parallelism only the last stage knows the losses; the others have less than any.
        for name in ("validation_loss", "test_loss"):
            known = torch.tensor(self._curve[name], dtype=torch.float64, device=device)
            torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MAX)
            self._curve[name] = known.tolist()
        result = {
            "curve": self._curve,
            "wall_seconds": time.perf_counter() - self._created,
            "peak_is_of_training": measure.peak_is_resettable(),
        }
        measure.write(self._out, result, self._peaks, device)
