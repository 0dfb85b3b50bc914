"""From the `[let]` table to what the run will do: which schedule, which layers, which maths."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS, LayerPair
from let_plugin.alignment.losses import LOSSES, Alignment, AlignmentLoss
from let_plugin.alignment.projectors import DIMENSION_MATCHES
from let_plugin.alignment.schedules import SCHEDULES, Schedule
from let_plugin.alignment.tap import Align
from let_plugin.config import LetConfig
from let_plugin.errors import ConfigError, Problem
from let_plugin.teacher.base import TeacherInfo

if TYPE_CHECKING:
    from torchtitan.config import CompileConfig
    from torchtitan.trainer import Trainer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def stop_step(config: "Trainer.Config") -> int:
    """S_stop: the first step (0-based) without the teacher. ConfigError if it is beyond the run or negative."""
    let: LetConfig = config.let
    if let.stop_step is None:
        if not 0 <= let.stop_fraction <= 1:
            raise ConfigError(
                Problem("let.stop_fraction", "must be between 0 and 1, a fraction of the run", let.stop_fraction)
            )
        return int(let.stop_fraction * config.training.steps)
    if not 0 <= let.stop_step <= config.training.steps:
        raise ConfigError(
            Problem("let.stop_step", f"must be between 0 and training.steps = {config.training.steps}", let.stop_step)
        )
    return let.stop_step


def teacher_dtype(config: "Trainer.Config") -> torch.dtype:
    """Data type of the teacher's weights and maths: `let.teacher.dtype`, or the student's."""
    name = config.let.teacher.dtype
    return _DTYPES[config.training.mixed_precision_param if name == "auto" else name]


def target_dtype(config: "Trainer.Config") -> torch.dtype:
    """Data type in which the target waits for the block's output: `let.target_dtype`, or the teacher's."""
    name = config.let.target_dtype
    return teacher_dtype(config) if name == "auto" else _DTYPES[name]


def schedule(let: LetConfig) -> Schedule:
    """The schedule that lambda follows. ConfigError for an unknown name."""
    return SCHEDULES.get(let.schedule, key="let.schedule")


def layer_pair(config: "Trainer.Config", teacher: TeacherInfo) -> LayerPair:
    """The student's block and the teacher's layer that meet. ConfigError for an unknown mapping or block."""
    let: LetConfig = config.let
    assert config.model_spec is not None
    num_blocks = len(config.model_spec.model.layers)
    mapping = LAYER_MAPPINGS.get(let.layer_mapping, key="let.layer_mapping")
    if let.student_block is None:
        return mapping(num_blocks, teacher.num_layers)
    if not 0 <= let.student_block < num_blocks:
        raise ConfigError(
            Problem("let.student_block", f"the student has blocks 0 to {num_blocks - 1}", let.student_block)
        )
    return LayerPair(let.student_block)


def dimension_match(let: LetConfig) -> Callable[[int, int], nn.Module]:
    """(teacher's width, student's width) -> the module that maps one to the other. ConfigError for an unknown name."""
    make = DIMENSION_MATCHES.get(let.dimension_match, key="let.dimension_match")
    return functools.partial(make, align_corners=let.align_corners)


def loss(let: LetConfig) -> AlignmentLoss:
    """The alignment loss. ConfigError for an unknown name."""
    return LOSSES.get(let.loss, key="let.loss")


def alignment(let: LetConfig, match: nn.Module, compile_config: "CompileConfig | None" = None) -> Align:
    """The alignment maths as one function, compiled if torchtitan compiles."""
    losses, dtype = loss(let), _DTYPES[let.math_dtype]

    # The one place where the two states are brought to the dtype of the maths.
    def align(student_BLD: torch.Tensor, teacher_BLE: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
        return losses(student_BLD.to(dtype), match(teacher_BLE.to(dtype)), coefficient)

    return _compiled(align, compile_config)


def learned_alignment(
    let: LetConfig, match: nn.Module, compile_config: "CompileConfig | None" = None
) -> Callable[..., tuple[Alignment, dict[str, torch.Tensor]]]:
    """As `alignment`, for a match that learns: takes its weights as well, and returns their gradients as well."""
    losses, dtype = loss(let), _DTYPES[let.math_dtype]

    def align(
        student_BLD: torch.Tensor,
        teacher_BLE: torch.Tensor,
        coefficient: torch.Tensor,
        weights: dict[str, torch.Tensor],
    ) -> tuple[Alignment, dict[str, torch.Tensor]]:
        # Tokens that do not count have a state of zeros, and must keep it whatever the projector adds.
        counts_BL1 = teacher_BLE.ne(0).any(dim=-1, keepdim=True)

        def project(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
            return torch.func.functional_call(match, weights, (teacher_BLE.to(dtype),)) * counts_BL1

        target_BLD, backward = torch.func.vjp(project, weights)  # type: ignore[misc]
        result = losses(student_BLD.to(dtype), target_BLD, coefficient)
        return result, backward(result.target_gradient_BLD)[0]

    return _compiled(align, compile_config)


def _compiled(function: Callable[..., Any], compile_config: "CompileConfig | None") -> Callable[..., Any]:
    if compile_config is None or not compile_config.enable:
        return function
    return torch.compile(function, backend=compile_config.backend, fullgraph=True)
