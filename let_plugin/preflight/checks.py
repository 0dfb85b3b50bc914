"""Checks a configuration before anything is built.

Every mistake is collected, so that one start shows them all. Nothing here needs a process group or a device: models
are built on the meta device. A check reads and writes `Facts`, refuses there what is wrong or raises a ConfigError.
"""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.config import LetConfig, plan
from let_plugin.config.errors import ConfigError, Problem, raise_if_any, suggest
from let_plugin.config.schema import check_bounds
from let_plugin.guidance import stopping, teacher_loss
from let_plugin.preflight import teacher_checks
from let_plugin.preflight.report import Facts, Student, TermFacts, report
from let_plugin.runtime import checkpoint, data
from let_plugin.runtime.held_out import TwoSplitValidator
from let_plugin.runtime.upstream import DATASETS, HuggingFaceTextDataLoader


def run(config: Trainer.Config, world_size: int | None = None) -> str:
    """Validates `config` and returns the report, lines for people. ConfigError lists everything that is wrong.

    `world_size` is the number of processes that it is to run on; None: that of this job.
    """
    facts = examine(config, world_size)
    raise_if_any(facts.problems)
    return report(facts)


def examine(config: Trainer.Config, world_size: int | None) -> Facts:
    """What all checks have found out about `config`, its mistakes among it; `world_size` as for `run`."""
    facts = Facts(config=config, world_size=world_size)
    facts.attempt(check_bounds, config)  # Python may have set numbers, which no reader of a file has checked
    for check in GENERAL_CHECKS:
        facts.attempt(check, facts)
    if config.let.enable and (facts.student is None or facts.student.is_decoder):
        facts.terms = [TermFacts(term) for term in plan.terms(config.let)]
        for check in LET_CHECKS:
            facts.attempt(check, facts)
        needs_teacher = any(of_term.term.has_teacher for of_term in facts.active_terms)
        for check in TEACHER_CHECKS if needs_teacher else [check_pairs]:
            facts.attempt(check, facts)
        if plan.changes_the_start(config.let):
            for check in START_CHECKS:
                facts.attempt(check, facts)
    return facts


def find_world_size(facts: Facts) -> None:
    """In torchtitan's dry run one process takes itself for one of NGPU ranks."""
    if facts.world_size is not None:
        return
    mode = facts.config.comm.mode
    num_ranks = os.environ.get("NGPU", "") if mode in ("fake_backend", "local_tensor") else os.environ["WORLD_SIZE"]
    if num_ranks.isdecimal() and int(num_ranks) >= 1:
        facts.world_size = int(num_ranks)
    else:
        message = "needs the number of ranks in the environment variable NGPU, as in NGPU=32 let-train ..."
        facts.refuse("comm.mode", message, mode)


def find_parallel_dims(facts: Facts) -> None:
    if facts.world_size is None:
        return
    parallelism = facts.config.parallelism
    try:
        facts.parallel_dims = ParallelDims.from_config(parallelism, facts.world_size)
    except AssertionError:
        degrees = {key: value for key, value in asdict(parallelism).items() if key.endswith("_degree")}
        given = ", ".join(f"{key} = {degree}" for key, degree in degrees.items() if degree not in (1, -1))
        facts.refuse(
            "parallelism",
            f"{given or 'all degrees 1'}: degrees must be at least 1 (data_parallel_shard_degree = -1: what the others "
            f"leave) and their product the number of processes, {facts.world_size}; start as many as they need: "
            "torchrun --nproc-per-node N",
        )


def check_batch_size(facts: Facts) -> None:
    if facts.num_data_parallel is None:
        return
    wanted, per_step = facts.config.training.global_batch_size, facts.config.training.local_batch_size
    per_step *= facts.num_data_parallel
    if wanted == 0 or (wanted > 0 and (per_step == 0 or wanted % per_step)):
        message = f"must be a multiple of local_batch_size times the data-parallel degree, {per_step}; -1 is just that"
        facts.refuse("training.global_batch_size", message, wanted)


def check_loss_chunks(facts: Facts) -> None:
    loss, seq_len = facts.config.loss, facts.config.training.seq_len
    if not isinstance(loss, ChunkedLossWrapper.Config) or min(loss.num_chunks, seq_len) < 1:
        return
    if seq_len % loss.num_chunks:
        facts.refuse("training.seq_len", f"must be a multiple of loss.num_chunks = {loss.num_chunks}", seq_len)


def find_student(facts: Facts) -> None:
    if facts.config.training.seq_len < 1:
        return
    try:
        facts.student = Student(facts.config)
    except (ValueError, AssertionError, NotImplementedError) as error:  # torchtitan's own complaints
        raise ConfigError(Problem("training", str(error) or type(error).__name__)) from error
    if facts.config.let.enable and not facts.student.is_decoder:
        message = f"LET aligns the blocks of a decoder, and {facts.student.name} is none; train it without LET"
        facts.refuse("let.enable", message, True)


def check_tokenizer(facts: Facts) -> None:
    config = facts.config
    assert config.model_spec is not None
    vocab_size: int | None = getattr(config.model_spec.model, "vocab_size", None)
    if vocab_size is None:
        return  # not a model of tokens: its own tokenizer knows what it needs
    tokenizer = student_tokenizer(config)
    vocabulary: dict[str, int] = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    if (highest := max(vocabulary.values(), default=-1)) >= vocab_size:
        message = f"its ids go up to {highest}, the model has {vocab_size} embeddings; choose a base with more"
        return facts.refuse("hf_assets_path", message, config.hf_assets_path)
    facts.student_vocabulary = vocabulary


def student_tokenizer(config: Any) -> Any:
    """Of torchtitan's kind. ConfigError if `hf_assets_path` has none."""
    try:
        return config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    except ConfigError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        message = f"{error}; it must be a folder with the student's tokenizer"
        raise ConfigError(Problem("hf_assets_path", message, config.hf_assets_path)) from error


def check_datasets(facts: Facts) -> None:
    validator = facts.config.validator
    facts.attempt(_check_dataset, "dataloader", facts.config.dataloader)
    if validator.enable:
        facts.attempt(_check_dataset, "validator.dataloader", validator.dataloader)
        if isinstance(validator, TwoSplitValidator.Config):
            facts.attempt(_check_dataset, "validator.test", validator.test)


def _check_dataset(key: str, loader: Any) -> None:
    if not isinstance(loader, HuggingFaceTextDataLoader.Config):
        return  # another data loader knows by itself what it needs
    if loader.dataset not in DATASETS:
        message = f"unknown dataset; {suggest(loader.dataset, DATASETS)}"
        raise ConfigError(Problem(f"{key}.dataset", message, loader.dataset))
    entry = DATASETS[loader.dataset]
    path = loader.dataset_path or entry.path
    if entry.loader is data.load_text_files:
        data.find_text_files(path, key=f"{key}.dataset_path")
    elif loader.dataset_path and path.startswith((".", "/")) and not os.path.exists(path):
        raise ConfigError(Problem(f"{key}.dataset_path", "no such file or folder", path))


def check_writable(key: str, folder: str | Path) -> None:
    """ConfigError, naming the field `key`, if `folder` is none and cannot become one, or cannot be written to."""
    existing = existing_parent(folder)
    try:
        tempfile.TemporaryFile(dir=existing).close()  # no permission says so: root may not write into /proc
    except OSError as error:
        what = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(Problem(key, f"{existing} {what}; choose another folder", str(folder))) from error


def existing_parent(path: str | Path) -> Path:
    """The deepest part of a path that exists."""
    path = Path(path).absolute()
    return next(part for part in (path, *path.parents) if part.exists())


def find_resumption(facts: Facts) -> None:
    facts.resumption = found = checkpoint.find(facts.config)
    if found is None or None in (found.num_data_parallel, facts.num_data_parallel):
        return
    if found.num_data_parallel != facts.num_data_parallel:  # torchtitan cannot share the places anew
        message = (
            f"the checkpoint {found.path} has the places in the data of {found.num_data_parallel} data-parallel ranks, "
            f"and this run has {facts.num_data_parallel}: run with as many, or begin with the data anew "
            '(checkpoint.exclude_from_loading = ["dataloader"])'
        )
        facts.refuse("parallelism", message)


def find_end(facts: Facts) -> None:
    """The stop step of each term, and the step of its end if that is past."""
    for of_term in facts.terms:
        facts.attempt(_find_end, facts, of_term)


def _find_end(facts: Facts, of_term: TermFacts) -> None:
    term = of_term.term
    if facts.num_data_parallel is not None or term.config.stop_tokens is None:  # only tokens depend on the degree
        of_term.stop_step = plan.stop_step(facts.config, term, facts.num_data_parallel or 1)
        of_term.ended_at = stopping.ended_at(facts.config, term, of_term.stop_step, facts.resumption)


def check_strategies(facts: Facts) -> None:
    """Names and options of what a name selects."""
    let: LetConfig = facts.config.let
    facts.attempt(plan.check_terms, let)
    for term in (of_term.term for of_term in facts.terms):
        facts.attempt(plan.schedule, term)
        facts.attempt(plan.adaptive_stop, let, term)
        facts.attempt(plan.loss, term)
        facts.attempt(plan.dimension_match, term.config, term.key)


def check_let_parallelism(facts: Facts) -> None:
    parallelism = facts.config.parallelism
    cp_is_on = parallelism.context_parallel_degree > 1
    if cp_is_on and parallelism.context_parallel_load_balancer == "ptrr":
        message = 'cuts each batch in another way, LET cuts the states once and for all; choose "headtail" or "none"'
        facts.refuse("parallelism.context_parallel_load_balancer", message, "ptrr")
    sequence_is_cut = cp_is_on or (parallelism.tensor_parallel_degree > 1 and parallelism.enable_sequence_parallel)
    message = "compares the tokens of a sequence, which context or sequence parallelism cuts; take a loss per token"
    for term in (of_term.term for of_term in facts.terms):
        if term.config.signal == "states" and sequence_is_cut and plan.loss_entry(term).needs_whole_sequence:
            facts.refuse(f"{term.key}.loss", message, term.config.loss)


def check_validation(facts: Facts) -> None:
    """What an adaptive stop by validation needs."""
    let, validator = facts.config.let, facts.config.validator
    by_validation = [t.term for t in facts.terms if t.term.config.adaptive_stop.criterion == "validation"]
    if not by_validation:
        return
    if not validator.enable:
        return facts.refuse("validator.enable", 'let.adaptive_stop.criterion = "validation" needs it', False)
    not_measurable = {
        "let.teacher.features has the teacher's states, not its predictions": let.teacher.features,
        "losses under two tokenizers cannot be compared token by token": let.token_alignment.enable,
        "this validator is of another kind than torchtitan's": not teacher_loss.is_measurable(validator),
    }
    reasons = [reason for reason, holds in not_measurable.items() if holds]
    for term in by_validation:
        if reasons and term.config.adaptive_stop.teacher_loss is None:
            facts.refuse(f"{term.key}.adaptive_stop.teacher_loss", f"must be given: {reasons[0]}", None)


def check_pairs(facts: Facts) -> None:
    """Whether each block exists and is on a pipeline stage. torchtitan leaves out, silently, what no stage lists."""
    depth = None if facts.source is None else facts.source.info.num_layers
    for of_term in facts.active_terms:
        if not (of_term.term.has_teacher and depth is None):
            facts.attempt(_check_pairs, facts, of_term, depth)


def _check_pairs(facts: Facts, of_term: TermFacts, depth: int | None) -> None:
    of_term.pairs = pairs = plan.pairs(facts.config, of_term.term, depth)
    parallelism = facts.config.parallelism
    stages = parallelism.module_fqns_per_model_part
    if parallelism.pipeline_parallel_degree <= 1 or not stages:
        return
    blocks = {f"layers.{pair.student}" for pair in pairs}
    if missing := sorted(block for block in blocks if not any(block in stage for stage in stages)):
        message = f"no stage has {', '.join(missing)}, which is to be aligned"
        facts.refuse("parallelism.module_fqns_per_model_part", message)


# In this order: later ones use what earlier ones have found.
GENERAL_CHECKS = [
    find_world_size,
    find_parallel_dims,
    check_batch_size,
    check_loss_chunks,
    find_student,
    check_tokenizer,
    check_datasets,
    lambda facts: check_writable("dump_folder", facts.config.dump_folder),
    find_resumption,
]
LET_CHECKS = [check_strategies, check_validation, check_let_parallelism, teacher_checks.check_rows, find_end]
TEACHER_CHECKS = [
    teacher_checks.find_source,
    check_pairs,
    teacher_checks.check_dimension_match,
    teacher_checks.check_tensor_parallel,
    teacher_checks.check_sequence_length,
    teacher_checks.check_stored_states,
    teacher_checks.check_token_alignment,
    teacher_checks.check_vocabulary,
]
START_CHECKS = [teacher_checks.check_parts, teacher_checks.check_upper_blocks, teacher_checks.find_start]
