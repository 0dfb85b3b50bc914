"""The states of a teacher with another tokenizer, from the `[let.token_alignment]` table to the student's tokens.

Shape legend: B batch (this rank's rows), L the student's sequence, T the teacher's, E teacher width.
"""

import copy
import itertools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.teacher.base import StateProvider, States, Teacher, TeacherInfo, TeacherSource
from let_plugin.tokens.alignment import Retokenizer
from let_plugin.tokens.token_bytes import token_bytes

# How many of the student's tokens, at least, a trial looks at.
_TRIAL_TOKENS = 16_384


class RetokenizedStates(StateProvider):
    """The teacher runs on its own tokens of the student's text, which the data loader makes by `retokenizer`."""

    def __init__(self, teacher: Teacher, retokenizer: Retokenizer) -> None:
        self.teacher: Teacher = teacher
        self.make_extras = retokenizer

    def states(self, batch: Mapping[str, torch.Tensor], student_masks: Any = None) -> States:
        tokens_BT, index_BL = batch["teacher_tokens"], batch["teacher_index"]
        states_BTE = self.teacher(tokens_BT, batch.get("teacher_positions"))
        states_BLE = states_BTE.take_along_dim(index_BL.clamp(min=0)[..., None], dim=1)
        return States(states_BLE, index_BL >= 0, tokens_BT.numel())


def teacher_tokenizer(config: Trainer.Config, student: Any, source: TeacherSource) -> Any:
    """The teacher's; ConfigError if it has none, or the bytes of its tokens or of those of `student` are not known."""
    teacher = source.tokenizer()
    if teacher is None:
        message = "the teacher comes without a tokenizer; name a folder with its tokenizer.json"
        raise ConfigError(Problem("let.teacher.tokenizer_path", message, config.let.teacher.tokenizer_path))
    problems = []
    for whose, tokenizer in (("student's", student), ("teacher's", teacher)):
        try:
            token_bytes(tokenizer)
        except ValueError as error:
            message = f"the {whose} tokenizer cannot be matched with another one: {error}"
            problems.append(Problem("let.token_alignment.enable", message, True))
    if (highest := max(teacher.get_vocab().values(), default=-1)) >= source.info.vocab_size:
        message = f"it has {source.info.vocab_size:,} rows, its tokenizer ids up to {highest:,}; it is not its own"
        problems.append(Problem("let.teacher.path", message, config.let.teacher.path))
    raise_if_any(problems)
    return teacher


def retokenizer(config: Trainer.Config, student: Any, source: TeacherSource) -> Retokenizer:
    """What makes the teacher's batches of those of a student with the tokenizer `student`. Errors as above."""
    teacher = teacher_tokenizer(config, student, source)
    return Retokenizer(student, teacher, teacher_seq_len=teacher_seq_len(config, source.info))


def teacher_seq_len(config: Trainer.Config, teacher: TeacherInfo) -> int:
    """T. ConfigError if it is too long for the teacher."""
    wanted, longest = config.let.token_alignment.teacher_seq_len, teacher.max_seq_len
    if wanted is None:
        length = -(-config.training.seq_len * 5 // 64) * 16
        return length if longest is None else min(length, longest)
    if longest is not None and wanted > longest:
        message = f"must be at most {longest}, for which the teacher was built"
        raise ConfigError(Problem("let.token_alignment.teacher_seq_len", message, wanted))
    return wanted


def try_out(config: Trainer.Config, student: Any, retokenize: Retokenizer) -> list[str]:
    """Lines for people: what becomes of the first batches of the student's data. ConfigError if they cannot be read.

    Warns if fewer than half of their tokens have a state.
    """
    loader_config = copy.copy(config.dataloader)
    if hasattr(loader_config, "num_workers"):
        loader_config.num_workers = 0  # a trial starts no processes
    try:
        loader = loader_config.build(
            dp_world_size=1,
            dp_rank=0,
            tokenizer=student,
            seq_len=config.training.seq_len,
            local_batch_size=config.training.local_batch_size,
        )
        batch_tokens = config.training.local_batch_size * config.training.seq_len
        batches = list(itertools.islice(loader, -(-_TRIAL_TOKENS // batch_tokens)))
    except ConfigError:
        raise
    except Exception as error:  # of the data set's own library
        raise ConfigError(Problem("dataloader", f"the first batches cannot be read: {error}")) from error
    if not batches:
        raise ConfigError(Problem("dataloader", "has no batch to try the teacher's tokenizer on"))
    started = time.perf_counter()
    rows = [row for batch in batches for row in retokenize.rows(*batch)]
    seconds = time.perf_counter() - started
    counts = torch.cat([labels_BL.flatten() for _, labels_BL in batches]).numpy() != IGNORE_INDEX
    index = np.concatenate([row.index_L for row in rows])[counts]
    lengths = [len(row.tokens) for row in rows]
    aligned = ((index >= 0) & (index < retokenize.teacher_seq_len)).mean()
    exact = np.concatenate([row.is_exact_L for row in rows])[counts].mean()
    if not aligned >= 0.5:
        logger.warning(
            f"LET: only {aligned:.1%} of the tokens of the first {len(rows)} rows have a state of the teacher's: the "
            f"longest row has {max(lengths)} of its tokens, and let.token_alignment.teacher_seq_len is "
            f"{retokenize.teacher_seq_len}. Raise that, or take a teacher whose tokenizer is closer"
        )
    return [
        f"two tokenizers, matched by bytes of text; of {len(rows)} rows of the data:",
        f"{aligned:.1%} of the tokens have a state of the teacher's, {exact:.1%} one of the same end",
        f"{config.training.seq_len} tokens are {sum(lengths) / len(rows):.0f} of the teacher's, {max(lengths)} at "
        f"most, with room for {retokenize.teacher_seq_len} (let.token_alignment.teacher_seq_len)",
        f"{counts.size / seconds:,.0f} tokens/s are retokenized by each worker (dataloader.num_workers)",
    ]
