"""Where the time of a step with LET goes, by torch's profiler; in a run of its own, for it takes time itself."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torchtitan.trainer import Trainer

from let_plugin.alignment.tap import ALIGNMENT_RANGE, INJECTION_RANGE
from let_plugin.guidance.guidance import TARGET_RANGE
from let_plugin.teacher.base import MASK_RANGE
from let_plugin.teacher.sharding import DELIVERY_RANGE, TEACHER_RANGE

_RANGES = (TARGET_RANGE, TEACHER_RANGE, DELIVERY_RANGE, ALIGNMENT_RANGE, INJECTION_RANGE)
_COLLECTIVE, _PRODUCT, _ATTENTION, _MASK = "collective", "matrix products", "attention", "attention mask"
# How the names of events begin. Attention that is compiled (FlexAttention) has no name of its own.
_KINDS = {
    _COLLECTIVE: ("c10d::", "gloo:", "nccl:"),
    _PRODUCT: ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_int_mm"),
    _ATTENTION: ("aten::_scaled_dot_product", "aten::scaled_dot_product", "torch_attn::"),
    _MASK: (MASK_RANGE,),
}


class StepProfiler:
    """Profiles from its making until `finish`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._profile = torch.profiler.profile()  # of the host, and of an accelerator that is there
        self._profile.start()

    def finish(self, num_steps: int) -> dict[str, float]:
        """Part of LET -> seconds per step on this rank, of the device.

        A collective that overlaps with other work counts as long as it takes, not as long as it is waited for.
        """
        self._profile.stop()
        is_cpu = self._trainer.device.type == "cpu"
        ranges, inside = range_seconds(self._profile.events(), on_device=not is_cpu)
        seconds = {name: ranges[name] / num_steps for name in _RANGES}
        parts = {kind: inside[TEACHER_RANGE, kind] / num_steps for kind in _KINDS}
        communication = parts.pop(_COLLECTIVE)
        rest = seconds[TEACHER_RANGE] - communication
        if self._trainer.config.let.teacher.features:
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
