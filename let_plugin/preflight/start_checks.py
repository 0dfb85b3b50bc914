"""Checks of `[let.init]`, which sets weights of a run from scratch; see `checks`."""

import os
from typing import Any

from let_plugin.config import plan
from let_plugin.guidance.initialization import OUTPUT_PROJECTION, first_upper_block, token_pieces
from let_plugin.preflight.report import Facts
from let_plugin.preflight.teacher_checks import check_vocabulary
from let_plugin.teacher.base import TeacherSource
from let_plugin.teacher.open import open_teacher


def check_parts(facts: Facts) -> None:
    """Whether the student has the layers that are to be set, and nothing else sets them."""
    parts, student, settings = facts.config.let.init.parts, facts.student, facts.config.checkpoint
    for key in ("initial_load_path", "initial_load_in_hf"):
        if settings.enable and (value := getattr(settings, key, None)):
            message = "not together with let.init: the run would start from there; leave one of the two out"
            facts.refuse(f"checkpoint.{key}", message, value)
    if student is not None and student.is_tied and parts == "both":
        message = "the student's embeddings and head are one tensor, and would be two; choose one of them"
        facts.refuse("let.init.parts", message, parts)


def check_upper_blocks(facts: Facts) -> None:
    """Whether there are blocks above the aligned one, and whether it is known what they end with."""
    upper_blocks, student = facts.config.let.init.upper_blocks, facts.student
    if upper_blocks == "keep" or student is None or facts.resumption is not None:
        return
    facts.first_upper_block = first = first_upper_block(facts.config)
    message = f"there is no block above layers.{first - 1}, which is aligned" if first == student.num_blocks else ""
    for block in (f"layers.{i}." for i in range(first, student.num_blocks)):
        if sum(name.startswith(block) and bool(OUTPUT_PROJECTION.search(name)) for name in student.names) < 2:
            message = f"it is not known which parameters of {block} are its output projections"
    if message:
        facts.refuse("let.init.upper_blocks", f'{message}; choose "keep"', upper_blocks)


def find_start(facts: Facts) -> None:
    """The teacher that the student starts from, and how many of its rows each of the student's tokens takes."""
    config: Any = facts.config
    if config.let.init.parts == "none" or facts.resumption is not None:
        return
    facts.start = facts.source if isinstance(facts.source, TeacherSource) else open_teacher(config.let.teacher)
    info = facts.start.info
    if info.width(0, False) != info.hidden_size:
        message = "its embeddings and its last states have another width than its blocks; choose another teacher"
        return facts.refuse("let.teacher.path", message, config.let.teacher.path)
    plan.basis(config, info.hidden_size)
    check_vocabulary(facts)
    if not facts.problems and os.environ["RANK"] == "0":
        tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
        facts.pieces = token_pieces(config, tokenizer, facts.start)


START_CHECKS = [check_parts, check_upper_blocks, find_start]
