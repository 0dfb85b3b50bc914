"""What a run of a throughput suite measures: the times of whole steps, and memory.

The host waits for the device before the first measured step and after the last, and never between them, unless the run
takes turns with others.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools import utils

from let_plugin.bench.throughput.profiling import StepProfiler
from let_plugin.bench.throughput.turns import Turn
from let_plugin.config import plan
from let_plugin.runtime import host


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
        self._marks: list[Any] = []  # start and end of each measured step
        self._profiler: StepProfiler | None = None
        self._turn = Turn(self.turns) if self.turns is not None and os.environ["RANK"] == "0" else None

    def _step(self, data_iterator: Iterator[Any]) -> None:
        number = self.trainer.step  # counts from 1
        # What the loop did between two steps belongs to the one before.
        if number > self.warmup + 1:
            self._mark()
        if self.turns is not None:
            self._next_turn(is_first=number == 1)
        if number == max(self.warmup, 1):
            # LET does so at its stop, a run without it never; what the allocator keeps is not to be compared.
            self._device_module.empty_cache()
        if number == self.warmup + 1:
            self._begin()
        if number > self.warmup:
            self._mark()
        self._train_step(data_iterator)
        if number <= self.warmup:
            return
        is_active = getattr(self.trainer, "guidance", None) is not None
        if self.is_active != is_active:
            raise RuntimeError(f"step {number} was to be measured with LET {'off' if is_active else 'active'}")
        if number == self.total:
            self._mark()
            self._end()

    def _next_turn(self, *, is_first: bool) -> None:
        """Lets the others make their steps. Rank 0 waits, and the other ranks for rank 0."""
        self._device_module.synchronize()
        if self._turn is not None:
            if not is_first:
                self._turn.give_back()
            self._turn.take()
        torch.distributed.barrier()

    def _begin(self) -> None:
        if self.profile:
            self._profiler = StepProfiler(self.trainer)
        self._device_module.synchronize()
        self._device_module.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def _mark(self) -> None:
        """Notes the time; on an accelerator by an event on its stream, read at the end, so that the host runs on."""
        if self.trainer.device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            self._marks.append(torch.Event(self.trainer.device, enable_timing=True))
            self._marks[-1].record()

    def _step_seconds(self) -> list[float]:
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self.trainer.device.type == "cpu":
            return [end - start for start, end in pairs]
        return [start.elapsed_time(end) / 1000 for start, end in pairs]

    def _end(self) -> None:
        self._device_module.synchronize()
        wall_seconds = time.perf_counter() - self._started
        memory = local_peak_memory(self.trainer.device)  # before anything else is allocated
        step_seconds = self._step_seconds()
        dims = self.trainer.parallel_dims
        result: dict[str, Any] = {
            "wall_seconds": wall_seconds if self.turns is None else sum(step_seconds),  # the others' steps left out
            "step_seconds": step_seconds,
            "tokens_per_step": plan.tokens_per_step(self.trainer.config, dims.dp_replicate * dims.dp_shard),
            "peak_is_of_measured_steps": peak_is_resettable(),
        }
        if self._profiler is not None:
            result["parts"] = self._profiler.finish(num_steps=self.total - self.warmup)
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
