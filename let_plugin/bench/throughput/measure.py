"""What a run of a throughput suite measures: the times of whole steps, memory and, in a run of its own, their parts.

The host waits for the device before the first measured step and after the last, and never between them, unless the run
takes turns with others.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools import utils

from let_plugin.alignment.tap import ALIGNMENT_RANGE, INJECTION_RANGE
from let_plugin.bench.throughput.turns import Turn
from let_plugin.config import plan
from let_plugin.guidance.guidance import TARGET_RANGE
from let_plugin.guidance.metrics import DeviceTimer
from let_plugin.runtime import host
from let_plugin.teacher.base import MASK_RANGE
from let_plugin.teacher.sharding import DELIVERY_RANGE, TEACHER_RANGE

_RANGES = (TARGET_RANGE, TEACHER_RANGE, DELIVERY_RANGE, ALIGNMENT_RANGE, INJECTION_RANGE)
# How the names of events begin. Attention that is compiled (FlexAttention) has no name of its own.
_KINDS = {
    "collective": ("c10d::", "gloo:", "nccl:"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_int_mm"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product", "torch_attn::"),
    "attention mask": (MASK_RANGE,),
}


@dataclass
class Watch:
    """Measures the steps of a run but for the first `warmup` of its `total`; rank 0 writes the result to `out`.

    RuntimeError if LET is active in a measured step and should not be, or the reverse.
    """

    trainer: Any
    out: str
    warmup: int
    total: int
    is_active: bool
    profile: bool = False  # also say where the time of the steps goes, which takes time itself
    turns: str | None = None  # who gives the turn for each step; None: it runs alone

    def start(self) -> None:
        """Before the first step."""
        self._train_step, self.trainer.train_step = self.trainer.train_step, self._step
        self._device_module: Any = utils.device_module
        self._timer = DeviceTimer(self.trainer.device)  # of each measured step
        self._turn = Turn(self.turns) if self.turns is not None and os.environ["RANK"] == "0" else None

    def _step(self, data_iterator: Iterator[Any]) -> None:
        number = self.trainer.step  # counts from 1
        # What the loop did between two steps belongs to the one before.
        if number > self.warmup + 1:
            self._timer.mark()
        if self.turns is not None:
            self._next_turn()
        if number == max(self.warmup, 1):
            # LET does so at its stop, a run without it never; what the allocator keeps is not to be compared.
            self._device_module.empty_cache()
        if number == self.warmup + 1:
            self._begin()
        if number > self.warmup:
            self._timer.mark()
        self._train_step(data_iterator)
        if number <= self.warmup:
            return
        is_active = getattr(self.trainer, "guidance", None) is not None
        if self.is_active != is_active:
            raise RuntimeError(f"step {number} was to be measured with LET {'off' if is_active else 'active'}")
        if number == self.total:
            self._timer.mark()
            self._end()

    def _next_turn(self) -> None:
        """Lets the others make their steps. Rank 0 waits, and the other ranks for rank 0."""
        self._device_module.synchronize()
        if self._turn is not None:
            self._turn.take()
        torch.distributed.barrier()

    def _begin(self) -> None:
        if self.profile:
            self._profiler = torch.profiler.profile()  # of the host, and of an accelerator that is there
            self._profiler.start()
        self._device_module.synchronize()
        self._device_module.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def _end(self) -> None:
        self._device_module.synchronize()
        wall_seconds = time.perf_counter() - self._started
        memory = local_peak_memory(self.trainer.device)  # before anything else is allocated
        step_seconds = self._timer.pop()
        dims = self.trainer.parallel_dims
        result: dict[str, Any] = {
            "wall_seconds": wall_seconds if self.turns is None else sum(step_seconds),  # the others' steps left out
            "step_seconds": step_seconds,
            "tokens_per_step": plan.tokens_per_step(self.trainer.config, dims.dp_replicate * dims.dp_shard),
            "peak_is_of_measured_steps": peak_is_resettable(),
        }
        if self.profile:
            self._profiler.stop()
            result["parts"] = parts_of_steps(self._profiler.events(), self.trainer, self.total - self.warmup)
        write(self.out, result, memory, self.trainer.device)
        if self._turn is not None:
            self._turn.end()


def local_peak_memory(device: torch.device) -> dict[str, int]:
    """Of this rank, since the last reset. CPU: resident; accelerator: what the allocator gave out, and what it held."""
    if device.type == "cpu":
        return {"resident": host.peak_resident_memory()}
    statistics = utils.device_module.memory_stats()
    return {name: statistics[f"{name}_bytes.all.peak"] for name in ("allocated", "reserved")}


def peak_is_resettable() -> bool:
    """False where the kernel forbids it: the peak is that of the whole process."""
    return getattr(utils.device_module, "peak_is_resettable", True)


def write(out: str, result: Mapping[str, Any], memory: Mapping[str, int], device: torch.device) -> None:
    """Rank 0 writes a run's result, with the peaks of the rank that has most. All ranks call it."""
    largest = torch.tensor(list(memory.values()), dtype=torch.int64, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    peaks = dict(zip(memory, largest.tolist(), strict=True))
    where = {"device_name": utils.device_module.get_device_name(), "num_threads": torch.get_num_threads()}
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps({**where, **result, "peak_memory_bytes": peaks}))


def parts_of_steps(events: Any, trainer: Any, num_steps: int) -> dict[str, float]:
    """Part of LET -> seconds per step on this rank, of the device.

    A collective that overlaps with other work counts as long as it takes, not as long as it is waited for.
    """
    ranges, inside = range_seconds(events, on_device=trainer.device.type != "cpu")
    seconds = {name: ranges[name] / num_steps for name in _RANGES}
    parts = {kind: inside[TEACHER_RANGE, kind] / num_steps for kind in _KINDS}
    communication = parts.pop("collective")
    rest = seconds[TEACHER_RANGE] - communication
    if trainer.config.let.teacher.features:
        teacher = {"reading the states": rest}
    else:
        teacher = {f"teacher: {kind}": part for kind, part in parts.items()}
        teacher["teacher: all else"] = rest - sum(parts.values())
    return teacher | {
        "communication": seconds[DELIVERY_RANGE] + communication,
        "masking the target": seconds[TARGET_RANGE] - seconds[TEACHER_RANGE] - seconds[DELIVERY_RANGE],
        # With torch.compile they are one function.
        "dimension match, loss, its gradient": seconds[ALIGNMENT_RANGE],
        "gradient injection": seconds[INJECTION_RANGE],
    }


def range_seconds(events: Any, *, on_device: bool) -> tuple[Mapping[str, float], Mapping[tuple[str, str], float]]:
    """Seconds of LET's ranges in a profile; and of what is directly in them, by range and kind of `_KINDS`.

    `on_device`: an accelerator's time counts, instead of the host's.
    """
    ranges: Counter[str] = Counter()
    inside: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # an accelerator's own events are counted with the calls that have started them
        seconds = (event.device_time_total if on_device else event.cpu_time_total) / 1e6
        if event.name in _RANGES:
            ranges[event.name] += seconds
        elif kind := _kind(event.name):
            parent = event.cpu_parent
            while parent is not None and parent.name not in _RANGES and not _kind(parent.name):
                parent = parent.cpu_parent
            if parent is not None and parent.name in _RANGES:
                inside[parent.name, kind] += seconds
    return ranges, inside


def _kind(name: str) -> str | None:
    return next((kind for kind, begins in _KINDS.items() if name.startswith(begins)), None)
