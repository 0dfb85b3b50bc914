"""From the `[let]` table to what the run will do: which schedule, which layers, which maths."""

from typing import TYPE_CHECKING

import torch

from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS, LayerPair
from let_plugin.alignment.losses import LOSSES, Alignment
from let_plugin.alignment.projectors import DIMENSION_MATCHES
from let_plugin.alignment.schedules import SCHEDULES, Schedule
from let_plugin.alignment.tap import Align
from let_plugin.config import LetConfig
from let_plugin.errors import ConfigError, Problem
from let_plugin.teacher.base import TeacherInfo

if TYPE_CHECKING:
    from torchtitan.config import CompileConfig
    from torchtitan.trainer import Trainer


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
    from torchtitan.config import TORCH_DTYPE_MAP

    name = config.let.teacher.dtype
    return TORCH_DTYPE_MAP[config.training.mixed_precision_param if name == "auto" else name]


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


def alignment(let: LetConfig, compile_config: "CompileConfig | None" = None) -> Align:
    """The alignment maths as one function, compiled if torchtitan compiles. ConfigError for an unknown name."""
    match = DIMENSION_MATCHES.get(let.dimension_match, key="let.dimension_match")
    loss = LOSSES.get(let.loss, key="let.loss")
    align_corners = let.align_corners

    def align(student_BLD: torch.Tensor, teacher_BLE: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
        # The one place where the teacher's state is brought to fp32; the losses do the same for the student's.
        target_BLD = match(teacher_BLE.float(), student_BLD.shape[-1], align_corners=align_corners)
        return loss(student_BLD, target_BLD, coefficient)

    if compile_config is not None and compile_config.enable:
        return torch.compile(align, backend=compile_config.backend, fullgraph=True)
    return align
