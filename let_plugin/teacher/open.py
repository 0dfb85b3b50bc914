"""From the `[let.teacher]` table to a teacher, or to its stored states."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from let_plugin.config import TeacherConfig, plan
from let_plugin.teacher.base import OnlineStates, StateProvider, TeacherSource, bad_path, require
from let_plugin.teacher.retokenized import RetokenizedStates, retokenizer
from let_plugin.teacher.stored.features import Features, StoredStates

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer


def open_teacher(config: TeacherConfig) -> TeacherSource:
    """Finds the teacher and reads what its files say of it, not its weights. ConfigError says what is missing or wrong.

    Without `spec`, torchtitan runs a Llama, by its config.json, and `transformers` runs any other model.
    """
    from let_plugin.teacher.titan.source import TRANSFORMERS, TitanTeacherSource

    if config.spec not in ("", TRANSFORMERS):
        return TitanTeacherSource(config)
    if not config.path:
        message = "no teacher is given; set it to a folder in Hugging Face format, a hub name or a .gguf file"
        raise bad_path(config.path, message)
    require("transformers")
    from let_plugin.teacher.hf.checkpoint import Checkpoint
    from let_plugin.teacher.hf.source import HFTeacherSource
    from let_plugin.teacher.titan.spec import obstacle

    checkpoint = Checkpoint(config)
    bare = "it was saved without its head" if checkpoint.is_bare else ""
    reason = f"teacher.spec = {TRANSFORMERS!r}" if config.spec else obstacle(checkpoint.model_config) or bare
    return HFTeacherSource(checkpoint, reason) if reason else TitanTeacherSource(config, checkpoint)


def open_source(config: TeacherConfig) -> TeacherSource | Features:
    """The stored states that the `[let.teacher]` table names, or else the teacher; ConfigError as in open_teacher."""
    return Features(config.features) if config.features else open_teacher(config)


def make_provider(
    source: TeacherSource | Features,
    config: "Trainer.Config",
    device: torch.device,
    parallel_dims: "ParallelDims",
    layers: Sequence[int | str],
    *,
    student_tokenizer: Any,
) -> StateProvider:
    """Loads the teacher, or opens the stored states. Arguments as in TeacherSource.build.

    A teacher with another tokenizer than the student's needs `student_tokenizer`.
    """
    if isinstance(source, Features):
        return StoredStates(source, layers, dtype=plan.teacher_dtype(config))
    make_batches = None
    if config.let.token_alignment.enable:
        make_batches = retokenizer(config, student_tokenizer, source)
        config = replace(config, training=replace(config.training, seq_len=make_batches.teacher_seq_len))
    teacher = source.build(config, device, parallel_dims, layers)
    return OnlineStates(teacher) if make_batches is None else RetokenizedStates(teacher, make_batches)
