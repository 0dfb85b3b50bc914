"""Where the time of a step with LET goes, by torch's profiler; in a run of its own, for it takes time itself."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torchtitan.trainer import Trainer

from let_plugin.alignment.losses import Alignment
from let_plugin.alignment.tap import ALIGNMENT_RANGE, INJECTION_RANGE
from let_plugin.config import plan
from let_plugin.guidance.guidance import TARGET_RANGE
from let_plugin.guidance.metrics import DeviceTimer
from let_plugin.teacher.base import MASK_RANGE
from let_plugin.teacher.open import open_source
from let_plugin.teacher.sharding import DELIVERY_RANGE, TEACHER_RANGE, sequence_shards

_RANGES = (TARGET_RANGE, TEACHER_RANGE, DELIVERY_RANGE, ALIGNMENT_RANGE, INJECTION_RANGE)
_COLLECTIVE, _PRODUCT, _ATTENTION, _MASK = "collective", "matrix products", "attention", "attention mask"
# How the names of events begin. Attention that is compiled (FlexAttention) has no name of its own.
_KINDS = {
    _COLLECTIVE: ("c10d::", "gloo:", "nccl:"),
    _PRODUCT: ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_int_mm"),
    _ATTENTION: ("aten::_scaled_dot_product", "aten::scaled_dot_product", "torch_attn::"),
    _MASK: (MASK_RANGE,),
}
_WARMUP_CALLS, _TIMED_CALLS = 3, 10


class StepProfiler:
    """Profiles from its making until `finish`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        activities = [ProfilerActivity.CPU]
        if trainer.device.type != "cpu":
            activities.append(getattr(ProfilerActivity, trainer.device.type.upper()))
        self._profile = torch.profiler.profile(activities=activities)
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
        match = seconds[ALIGNMENT_RANGE] * self._share_of_match()
        rest = seconds[TEACHER_RANGE] - communication
        if self._trainer.config.let.teacher.features:
            teacher = {"reading the states": rest}
        else:
            teacher = {f"teacher: {kind}": part for kind, part in parts.items()}
            teacher["teacher: all else"] = rest - sum(parts.values())
        return teacher | {
            "communication": seconds[DELIVERY_RANGE] + communication,
            "masking the target": seconds[TARGET_RANGE] - seconds[TEACHER_RANGE] - seconds[DELIVERY_RANGE],
            "dimension match": match,
            "loss and its gradient": seconds[ALIGNMENT_RANGE] - match,
            "gradient injection": seconds[INJECTION_RANGE],
        }

    def _share_of_match(self) -> float:
        """The share of the dimension matches in the time of the alignment.

        With torch.compile match and loss are one function. They are timed by themselves, and what they take together
        is divided in that proportion.
        """
        config, device = self._trainer.config, self._trainer.device
        let, guidance = config.let, self._trainer.guidance
        if let.target != "teacher" or not guidance.taps:
            return 0.0
        teacher = open_source(let.teacher).info
        shape = (
            config.training.local_batch_size,
            config.training.seq_len // sequence_shards(config, self._trainer.parallel_dims),
        )
        dtype, loss = plan.math_dtype(let), plan.loss(let)
        counts_BL, coefficient = torch.ones(shape, dtype=torch.bool, device=device), torch.ones((), device=device)

        def gradient(*given: torch.Tensor) -> Alignment:
            return loss(*given)._replace(target_gradient_BLD=None)

        of_match = of_loss = 0.0
        for pair in guidance.pairs:
            widths = teacher.width(pair.teacher, let.teacher.final_norm), config.model_spec.model.dim
            match = plan.dimension_match(let)(*widths).to(device)
            in_width, out_width = widths if let.projector.side == "teacher" else widths[::-1]
            hidden = torch.randn(*shape, in_width, device=device, dtype=dtype)
            student, target = torch.randn(2, *shape, out_width, device=device, dtype=dtype)
            of_match += self._seconds(match, hidden)
            of_loss += self._seconds(gradient, student, target, counts_BL, coefficient)
        return of_match / (of_match + of_loss)

    def _seconds(self, function: Callable[..., Any], *given: torch.Tensor) -> float:
        """Of one call, forward, compiled if torchtitan compiles."""
        compile_config = self._trainer.config.compile
        if compile_config.enable:
            function = torch.compile(function, backend=compile_config.backend)
        timer = DeviceTimer(self._trainer.device)
        with torch.no_grad():
            for _ in range(_WARMUP_CALLS):
                function(*given)
            with timer:
                for _ in range(_TIMED_CALLS):
                    function(*given)
        return timer.pop() / _TIMED_CALLS


def range_seconds(events: Any, *, on_device: bool) -> tuple[Mapping[str, float], Mapping[tuple[str, str], float]]:
    """Seconds of LET's ranges in a profile; and of what is directly in them, by range and kind of `_KINDS`.

    Args:
        events: Of torch's profiler.
        on_device: Whether an accelerator's time counts, instead of the host's.
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
