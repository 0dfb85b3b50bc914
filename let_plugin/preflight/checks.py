"""Checks a configuration before anything is built.

Every mistake is collected, so that one start shows them all. Nothing here needs a process group or a device: models
are built on the meta device. What the run will do is said by `report`.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.config import LetConfig, plan
from let_plugin.config.errors import ConfigError, Problem, suggest
from let_plugin.config.schema import check_bounds
from let_plugin.guidance import stopping, teacher_loss
from let_plugin.preflight import dry_run, teacher_checks
from let_plugin.preflight.report import Student, report, report_auxiliary, report_ended
from let_plugin.runtime import checkpoint, data
from let_plugin.runtime.held_out import TwoSplitValidator
from let_plugin.runtime.upstream import DATASETS, HuggingFaceTextDataLoader
from let_plugin.teacher.open import open_source
from let_plugin.teacher.stored.features import Features


def run(config: Trainer.Config, world_size: int | None = None) -> str:
    """Validates `config` and returns the report, lines for people. ConfigError lists everything that is wrong.

    Args:
        config: What is to run.
        world_size: On how many processes; None: on those of this job.
    """
    checks = _Checks()
    if world_size is None:
        world_size = checks(dry_run.world_size, config.comm, config.parallelism)
    checks(check_bounds, config)  # a number that Python set; those of a file and the command line are checked when read
    stop_is_a_number = not any(problem.key.startswith("let.stop_") for problem in checks.problems)
    parallel_dims = None if world_size is None else checks(_parallel_dims, config, world_size)
    if parallel_dims is not None:
        checks(_check_batch_size, config, parallel_dims)
    checks(_check_loss_chunks, config)
    student = checks(_student, config) if config.training.seq_len > 0 else None
    student_vocabulary = checks(_tokenizer_vocabulary, config)
    loaders = {"dataloader": config.dataloader, "validator.dataloader": config.validator.dataloader}
    if isinstance(config.validator, TwoSplitValidator.Config):
        loaders["validator.test"] = config.validator.test
    for key, loader in loaders.items():
        if key == "dataloader" or config.validator.enable:
            checks(_check_dataset, key, loader)
    checks(_check_dump_folder, config.dump_folder)
    resumption = checks(checkpoint.find, config)
    if resumption is not None and parallel_dims is not None:
        checks(resumption.check_data_parallel, parallel_dims.dp_replicate * parallel_dims.dp_shard)

    let: LetConfig = config.let
    if not let.enable:
        checks.finish()
        assert student is not None
        return "\n".join(["preflight", f"  student    {student}", "  LET        off: plain torchtitan"])

    stop_step = None
    if stop_is_a_number and (parallel_dims is not None or let.stop_tokens is None):  # only tokens depend on the degree
        num_data_parallel = 1 if parallel_dims is None else parallel_dims.dp_replicate * parallel_dims.dp_shard
        stop_step = checks(plan.stop_step, config, num_data_parallel)
    checks(plan.schedule, let)
    checks(plan.adaptive_stop, let)
    checks(_check_validation, config)
    checks(plan.loss, let)
    checks(plan.dimension_match, let)
    checks(_check_let_parallelism, config)
    if let.target == "labels":
        pairs = checks(plan.pairs, config, None)
        if pairs is not None:
            checks(_check_stages, config, pairs)
        checks.finish()
        assert student and pairs and stop_step is not None
        return report_auxiliary(config, student, pairs, stop_step)
    ended_at = None if stop_step is None else checks(stopping.ended_at, config, stop_step, resumption)
    if ended_at is not None:
        checks.finish()
        assert student
        return report_ended(student, ended_at)
    source, pairs, trial, vocabulary = checks(open_source, let.teacher), None, None, None
    if source is not None:
        pairs = checks(plan.pairs, config, source.info.num_layers)
        if pairs is not None:
            checks(_check_stages, config, pairs)
            if let.target == "teacher":
                checks(teacher_checks.check_dimension_match, config, pairs, source.info)
        checks(teacher_checks.check_tensor_parallel, let, source.info, config.parallelism.tensor_parallel_degree)
        if isinstance(source, Features):
            checks(teacher_checks.check_sequence_length, config, source.info)
            checks(teacher_checks.check_needs_teacher, let)
            if pairs is not None and parallel_dims is not None and stop_step is not None:
                known = {problem.key for problem in checks.problems}
                checks(teacher_checks.check_features, config, source, pairs, parallel_dims, known)
        elif let.token_alignment.enable and let.target == "logits":
            message = "the predictions of two tokenizers cannot be compared; take a teacher with the student's"
            checks.problems.append(Problem("let.token_alignment.enable", message, True))
        elif let.token_alignment.enable:
            trial = checks(teacher_checks.try_token_alignment, config, source, not checks.problems)
        else:
            checks(teacher_checks.check_sequence_length, config, source.info)
            if student_vocabulary is not None:
                vocabulary = checks(teacher_checks.check_vocabulary, student_vocabulary, source, let)
    checks.finish()
    assert student and parallel_dims and source and pairs and stop_step is not None
    return report(
        config,
        student,
        source.info,
        pairs,
        stop_step,
        parallel_dims,
        vocabulary=vocabulary,
        features=source if isinstance(source, Features) else None,
        trial=trial,
    )


class _Checks:
    """Runs checks one after the other and keeps what they complain about."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def __call__(self, check: Callable[..., Any], *args: Any) -> Any:
        """The check's result, or None if it raised a ConfigError."""
        try:
            return check(*args)
        except ConfigError as error:
            # Two checks may come by the same mistake.
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None

    def finish(self) -> None:
        if self.problems:
            raise ConfigError(self.problems)


@contextmanager
def _torchtitan_refuses(key: str) -> Iterator[None]:
    """Turns torchtitan's own complaint about a configuration into a Problem of `key`."""
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise ConfigError(Problem(key, str(error) or type(error).__name__)) from error


def _parallel_dims(config: Trainer.Config, world_size: int) -> ParallelDims:
    parallelism = config.parallelism
    degrees = {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "data_parallel_shard_degree": parallelism.data_parallel_shard_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
    }
    leftover = degrees["data_parallel_shard_degree"] == -1  # takes the ranks that the others leave
    if leftover:
        del degrees["data_parallel_shard_degree"]
    problems = [
        Problem(f"parallelism.{key}", "must be at least 1", degree) for key, degree in degrees.items() if degree < 1
    ]
    if problems:
        raise ConfigError(problems)
    needed = math.prod(degrees.values())
    if world_size % needed if leftover else world_size != needed:
        wanted = f"a multiple of {needed}" if leftover else str(needed)
        used = ", ".join(f"{key} = {degree}" for key, degree in degrees.items() if degree > 1) or "all degrees 1"
        raise ConfigError(
            Problem(
                "parallelism",
                f"{used}: this needs {wanted} processes and there {'is' if world_size == 1 else 'are'} {world_size}; "
                f"start it with torchrun --nproc-per-node {needed}",
            )
        )
    with _torchtitan_refuses("parallelism"):
        return ParallelDims.from_config(config.parallelism, world_size)


def _check_batch_size(config: Trainer.Config, parallel_dims: ParallelDims) -> None:
    training = config.training
    per_step = training.local_batch_size * parallel_dims.dp_replicate * parallel_dims.dp_shard
    if training.global_batch_size >= 0 and (
        training.global_batch_size == 0 or per_step == 0 or training.global_batch_size % per_step
    ):
        raise ConfigError(
            Problem(
                "training.global_batch_size",
                f"must be a multiple of training.local_batch_size times the data-parallel degree, {per_step}; "
                "-1 takes exactly that",
                training.global_batch_size,
            )
        )


def _check_loss_chunks(config: Trainer.Config) -> None:
    loss, seq_len = config.loss, config.training.seq_len
    if not isinstance(loss, ChunkedLossWrapper.Config) or min(loss.num_chunks, seq_len) < 1:
        return
    if seq_len % loss.num_chunks:
        raise ConfigError(
            Problem("training.seq_len", f"must be a multiple of loss.num_chunks = {loss.num_chunks}", seq_len)
        )


def _student(config: Trainer.Config) -> Student:
    with _torchtitan_refuses("training"):
        return Student(config)


def _tokenizer_vocabulary(config: Trainer.Config) -> dict[str, int]:
    path = config.hf_assets_path
    if not os.path.exists(path):
        raise ConfigError(Problem("hf_assets_path", "no such folder; it must hold the student's tokenizer", path))
    try:
        tokenizer: Any = config.tokenizer.build(tokenizer_path=path)
    except ConfigError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(Problem("hf_assets_path", f"the tokenizer cannot be loaded: {error}", path)) from error
    vocabulary: dict[str, int] = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    assert config.model_spec is not None
    vocab_size: int = config.model_spec.model.vocab_size
    if vocabulary and max(vocabulary.values()) >= vocab_size:
        raise ConfigError(
            Problem(
                "hf_assets_path",
                f"the tokenizer has ids up to {max(vocabulary.values())}, the model only {vocab_size} embeddings; "
                "choose a base with a larger vocabulary",
                path,
            )
        )
    return vocabulary


def _check_dataset(key: str, loader: Any) -> None:
    if not isinstance(loader, HuggingFaceTextDataLoader.Config):
        return  # another data loader knows by itself what it needs
    if loader.dataset not in DATASETS:
        raise ConfigError(
            Problem(f"{key}.dataset", f"unknown dataset; {suggest(loader.dataset, DATASETS)}", loader.dataset)
        )
    entry = DATASETS[loader.dataset]
    path = loader.dataset_path or entry.path
    if entry.loader is data.load_text_files:
        data.find_text_files(path, key=f"{key}.dataset_path")
    elif loader.dataset_path and path.startswith((".", "/")) and not os.path.exists(path):
        raise ConfigError(Problem(f"{key}.dataset_path", "no such file or folder", path))


def _check_dump_folder(path: str) -> None:
    existing = os.path.abspath(path)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise ConfigError(Problem("dump_folder", f"{existing} is a file; choose another folder", path))
    if not os.access(existing, os.W_OK):
        raise ConfigError(Problem("dump_folder", f"{existing} is not writable; choose another folder", path))


def _check_let_parallelism(config: Trainer.Config) -> None:
    parallelism = config.parallelism
    if parallelism.context_parallel_degree > 1 and parallelism.context_parallel_load_balancer == "ptrr":
        raise ConfigError(
            Problem(
                "parallelism.context_parallel_load_balancer",
                "cuts the sequence differently in each batch, and LET cuts the teacher's states once and for all; "
                'choose "headtail" or "none"',
                "ptrr",
            )
        )
    sequence_is_cut = parallelism.context_parallel_degree > 1 or (
        parallelism.tensor_parallel_degree > 1 and parallelism.enable_sequence_parallel
    )
    if config.let.target == "teacher" and sequence_is_cut and plan.loss_entry(config.let).needs_whole_sequence:
        raise ConfigError(
            Problem(
                "let.loss",
                "compares the tokens of a sequence, which context parallelism, and tensor parallelism with "
                "parallelism.enable_sequence_parallel, cut into parts; choose a loss per token",
                config.let.loss,
            )
        )


def _check_validation(config: Trainer.Config) -> None:
    settings = config.let.adaptive_stop
    if settings.criterion != "validation":
        return
    if not config.validator.enable:
        raise ConfigError(
            Problem("validator.enable", 'let.adaptive_stop.criterion = "validation" needs validation: true', False)
        )
    if settings.teacher_loss is not None:
        return
    let: LetConfig = config.let
    reason = ""
    if let.teacher.features:
        reason = "let.teacher.features has the teacher's states, not its predictions"
    elif let.token_alignment.enable:
        reason = "losses under two tokenizers cannot be compared token by token, so it cannot be measured"
    elif not teacher_loss.is_measurable(config.validator):
        reason = "this validator validates in a way of its own, which the teacher cannot take part in"
    if reason:
        raise ConfigError(Problem("let.adaptive_stop.teacher_loss", f"must be given: {reason}", None))


def _check_stages(config: Trainer.Config, pairs: Sequence[LayerPair]) -> None:
    """torchtitan leaves out, silently, a block that no pipeline stage lists."""
    stages = config.parallelism.module_fqns_per_model_part
    if config.parallelism.pipeline_parallel_degree <= 1 or not stages:
        return
    blocks = {f"layers.{pair.student}" for pair in pairs}
    missing = sorted(block for block in blocks if not any(block in stage for stage in stages))
    if missing:
        raise ConfigError(
            Problem(
                "parallelism.module_fqns_per_model_part", f"no stage has {', '.join(missing)}, which is to be aligned"
            )
        )
