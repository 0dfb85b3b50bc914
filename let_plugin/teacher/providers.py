"""Which StateProvider a run has."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from let_plugin.config import TeacherConfig, plan
from let_plugin.teacher.base import TeacherSource
from let_plugin.teacher.retokenized import RetokenizedStates, retokenizer, teacher_config
from let_plugin.teacher.sources import open_teacher
from let_plugin.teacher.states import OnlineStates, StateProvider
from let_plugin.teacher.stored.features import Features, StoredStates

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer


def open_source(config: TeacherConfig) -> TeacherSource | Features:
    """What the `[let.teacher]` table gives states of: those that are stored, if it names them, else the teacher.

    ConfigError says what is missing or wrong.
    """
    return Features(config.features) if config.features else open_teacher(config)


def make_provider(
    source: TeacherSource | Features,
    *,
    config: "Trainer.Config",
    student_tokenizer: Any,
    device: torch.device,
    parallel_dims: "ParallelDims",
    layers: Sequence[int | str],
) -> StateProvider:
    """Loads the teacher, or opens the stored states.

    Args:
        source: From `open_source`.
        config: The student's configuration.
        student_tokenizer: The student's tokenizer, for a teacher that has another.
        device: This rank's.
        parallel_dims: The teacher's device meshes: `sharding.teacher_parallel_dims`.
        layers: As in TeacherSource.build.
    """
    if isinstance(source, Features):
        return StoredStates(source, layers, dtype=plan.teacher_dtype(config), device=device)
    make_batches = None
    if config.let.token_alignment.enable:
        make_batches = retokenizer(config, student_tokenizer, source)
    teacher = source.build(
        dtype=plan.teacher_dtype(config),
        device=device,
        config=config if make_batches is None else teacher_config(config, make_batches.teacher_seq_len),
        parallel_dims=parallel_dims,
        layers=layers,
        final_norm=config.let.teacher.final_norm,
    )
    return OnlineStates(teacher) if make_batches is None else RetokenizedStates(teacher, make_batches)
