"""What a run of a convergence suite does at each evaluation: its losses, and the time and memory of training."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torchtitan.components.validate import Validator
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from let_plugin.bench.throughput import measure
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime.held_out import TwoSplitValidator

_SEEN = "seen.json"  # beside the checkpoints of a run: what its observer has seen by its last evaluation


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


def save_at_evaluations(config: Trainer.Config, folder: Path) -> None:
    """Makes a run save itself to `folder` before each evaluation, and go on from the last one there. In place."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = config.checkpoint
    settings.enable, settings.load_only, settings.folder, settings.async_mode = True, False, str(folder), "disabled"
    settings.interval, settings.keep_latest_k, settings.last_save_in_hf = config.validator.freq, 2, False
    seen = seen_before(folder)
    settings.exclude_from_loading, settings.load_step = [], seen["curve"][-1]["step"] if seen else -1


def seen_before(folder: Path) -> dict[str, Any] | None:
    """What a run's observer has seen by the last evaluation that it can go on from; None if there is none."""
    if not (file := folder / _SEEN).is_file():
        return None
    seen = json.loads(file.read_text())
    is_saved = (folder / f"step-{seen['curve'][-1]['step']}" / ".metadata").is_file()  # which is written last
    return seen if is_saved else None


class Observer:
    """Notes at each evaluation its losses, and what training has taken until then, evaluations left out.

    `trainer` has a TwoSplitValidator. Rank 0 writes the result to `out`, after the evaluation at the last step. `saved`
    is the folder of `save_at_evaluations`: what was seen before the run was broken off counts.
    """

    def __init__(self, trainer: Trainer, out: str, saved: str | None = None) -> None:
        self._trainer, self._out, self._saved = cast(Any, trainer), out, Path(saved) if saved else None
        self._device_module: Any = utils.device_module
        seen = (seen_before(self._saved) if self._saved else None) or {}
        self._curve: list[dict[str, Any]] = seen.get("curve", [])
        self._logged: list[dict[str, Any]] = seen.get("logged", [])
        self._peaks: dict[str, int] = seen.get("peaks", {})
        self._wall_seconds, self._num_resumptions = seen.get("wall_seconds", 0.0), seen.get("num_resumptions", -1) + 1
        last = self._curve[-1] if self._curve else {"seconds": 0.0, "active_steps": 0}
        self._seconds, self._active_steps = last["seconds"], last["active_steps"]

    def start(self) -> None:
        trainer = self._trainer
        self._train_step, trainer.train_step = trainer.train_step, self._count
        self._validate, trainer.validator.validate = trainer.validator.validate, self._evaluate
        # torchtitan resets the peak whenever it logs. Here it is that of all steps between two evaluations.
        trainer.metrics_processor.device_memory_monitor.reset_peak_stats = lambda: None
        self._device_module.reset_peak_memory_stats()
        self._started = time.perf_counter()
        self._created = self._started - self._wall_seconds

    def _count(self, data_iterator: Iterator[Any]) -> None:
        self._train_step(data_iterator)
        self._active_steps += getattr(self._trainer, "guidance", None) is not None

    def _evaluate(self, model_parts: list[nn.Module], step: int) -> None:
        self._device_module.synchronize()
        self._seconds += time.perf_counter() - self._started
        found = measure.local_peak_memory(self._trainer.device)
        self._peaks = {name: max(value, self._peaks.get(name, 0)) for name, value in found.items()}
        self._validate(model_parts, step)
        if not self._curve or self._curve[-1]["step"] < step:  # an adaptive stop repeats the last one when it goes on
            self._note(step)
        self._device_module.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def _note(self, step: int) -> None:
        device = self._trainer.device
        # With pipeline parallelism only the last stage knows the losses; the others have less than any.
        losses = torch.tensor(self._trainer.validator.losses, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(losses, torch.distributed.ReduceOp.MAX)
        point = {"step": step, "active_steps": self._active_steps, "seconds": self._seconds}
        self._curve.append(point | dict(zip(("validation_loss", "test_loss"), losses.tolist(), strict=True)))
        logged = self._trainer.metrics_processor.logger.logged  # of this step, or of the last one before it
        if own := {name: x for name, x in logged.items() if name.startswith("let") and math.isfinite(x)}:
            self._logged.append({"step": step, **own})
        seen: dict[str, Any] = {"curve": self._curve, "logged": self._logged}
        seen |= {"num_resumptions": self._num_resumptions, "wall_seconds": time.perf_counter() - self._created}
        if step == self._trainer.config.training.steps:
            measure.write(self._out, seen | {"peak_is_of_training": measure.peak_is_resettable()}, self._peaks, device)
        elif self._saved and torch.distributed.get_rank() == 0:
            (new := self._saved / f"{_SEEN}.new").write_text(json.dumps(seen | {"peaks": self._peaks}))
            new.replace(self._saved / _SEEN)
