"""Checks a configuration before anything is built, and says what the run will do.

Every mistake is collected, so that one start shows them all. Nothing here needs a process group or a device: models
are built on the meta device.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.trainer import Trainer

from let_plugin import data, host, plan
from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.config import LetConfig
from let_plugin.errors import ConfigError, Problem, suggest
from let_plugin.teacher.base import TeacherInfo, TeacherSource
from let_plugin.teacher.sources import open_teacher
from let_plugin.teacher.vocabulary import compare_vocabularies

# Numbers for which torchtitan itself would fail late or loop for ever: key -> smallest value that makes sense.
_MINIMA = {
    "training.steps": 1,
    "training.local_batch_size": 1,
    "training.seq_len": 1,
    "training.max_norm": 0,
    "training.gc_freq": 1,
    "metrics.log_freq": 1,
    "validator.freq": 1,
    "lr_scheduler.warmup_steps": 0,
    "let.weight": 0,
}


def run(config: Trainer.Config) -> str:
    """Validates `config` and returns the report, lines for people. ConfigError lists everything that is wrong."""
    checks = _Checks()
    world_size = int(os.environ["WORLD_SIZE"])
    for key, minimum in _MINIMA.items():
        checks.at_least(config, key, minimum)
    parallel_dims = checks(_parallel_dims, config, world_size)
    if parallel_dims is not None:
        checks(_check_batch_size, config, parallel_dims)
    student = checks(_Student, config)
    student_vocabulary = checks(_tokenizer_vocabulary, config)
    for key, loader in (("dataloader", config.dataloader), ("validator.dataloader", config.validator.dataloader)):
        if key == "dataloader" or config.validator.enable:
            checks(_check_dataset, key, loader)
    checks(_check_dump_folder, config.dump_folder)

    let: LetConfig = config.let
    if not let.enable:
        checks.finish()
        assert student is not None
        return "\n".join(["preflight", f"  student    {student}", "  LET        off: plain torchtitan"])

    stop_step = checks(plan.stop_step, config)
    checks(plan.schedule, let)
    checks(plan.alignment, let)
    checks(_check_let_parallelism, config)
    source = checks(open_teacher, let.teacher)
    if source is not None:
        pair = checks(plan.layer_pair, config, source.info)
        checks(_check_sequence_length, config, source.info)
        if student_vocabulary is not None:
            checks(_check_vocabulary, student_vocabulary, source, let)
    checks.finish()
    assert student and parallel_dims and source and pair and stop_step is not None
    return _report(config, student, source.info, pair, stop_step, parallel_dims)


class _Checks:
    """Runs checks one after the other and keeps what they complain about."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def __call__(self, check: Callable[..., Any], *args: Any) -> Any:
        """The check's result, or None if it raised a ConfigError."""
        try:
            return check(*args)
        except ConfigError as error:
            self.problems += error.problems
            return None

    def at_least(self, config: Trainer.Config, key: str, minimum: int) -> None:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if not (math.isfinite(value) and value >= minimum):
            self.problems.append(Problem(key, f"must be at least {minimum}", value))

    def finish(self) -> None:
        if self.problems:
            raise ConfigError(self.problems)


class _Student:
    """The student on the meta device: its size."""

    def __init__(self, config: Trainer.Config) -> None:
        spec = config.model_spec
        assert spec is not None
        spec = copy.copy(spec)
        spec.model = copy.deepcopy(spec.model)  # torchtitan writes into it
        host.adapt_model_spec(spec)
        with _torchtitan_refuses("training"):
            spec.model.update_from_config(config=config)
        with torch.device("meta"):
            model: Any = spec.model.build()
        self.name = f"{spec.name} {spec.flavor}"
        self.num_blocks = len(model.layers)
        self.width: int = spec.model.dim
        self.num_params = sum(p.numel() for p in model.parameters())
        tied = model.tok_embeddings.weight is model.lm_head.weight
        self.num_matmul_params = self.num_params - (0 if tied else model.tok_embeddings.weight.numel())

    def __str__(self) -> str:
        return f"{self.name}: {self.num_blocks} blocks of width {self.width}, {self.num_params:,} parameters"


@contextmanager
def _torchtitan_refuses(key: str) -> Iterator[None]:
    """Turns torchtitan's own complaint about a configuration into a Problem of `key`."""
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise ConfigError(Problem(key, str(error) or type(error).__name__)) from error


def _parallel_dims(config: Trainer.Config, world_size: int) -> ParallelDims:
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


def _tokenizer_vocabulary(config: Trainer.Config) -> dict[str, int]:
    path = config.hf_assets_path
    if not os.path.exists(path):
        raise ConfigError(Problem("hf_assets_path", "no such folder; it must hold the student's tokenizer.json", path))
    try:
        tokenizer: Any = config.tokenizer.build(tokenizer_path=path)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("hf_assets_path", f"the tokenizer cannot be loaded: {error}", path)) from error
    inner: Any = getattr(tokenizer, "tokenizer", None)
    vocabulary: dict[str, int] = inner.get_vocab() if hasattr(inner, "get_vocab") else {}
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
    degrees = {
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
    }
    problems = [
        Problem(f"parallelism.{key}", "LET runs under data parallelism (DDP, FSDP2, HSDP) so far; set it to 1", degree)
        for key, degree in degrees.items()
        if degree > 1
    ]
    if parallelism.spmd_backend == "full_dtensor":
        problems.append(
            Problem(
                "parallelism.spmd_backend",
                "LET runs with spmd_types and partial_dtensor so far",
                parallelism.spmd_backend,
            )
        )
    if problems:
        raise ConfigError(problems)


def _check_sequence_length(config: Trainer.Config, teacher: TeacherInfo) -> None:
    if teacher.max_seq_len is not None and config.training.seq_len > teacher.max_seq_len:
        raise ConfigError(
            Problem(
                "training.seq_len",
                f"the teacher was built for at most {teacher.max_seq_len} tokens",
                config.training.seq_len,
            )
        )


def _check_vocabulary(student: dict[str, int], source: TeacherSource, let: LetConfig) -> None:
    if not let.teacher.check_vocabulary:
        return
    teacher = source.vocabulary()
    if not teacher or not student:
        whose = "teacher" if not teacher else "student"
        raise ConfigError(
            Problem(
                "let.teacher.tokenizer_path",
                f"the {whose}'s tokenizer has no vocabulary to compare (no tokenizer.json); name the teacher's folder "
                "here, or set let.teacher.check_vocabulary = false if the two are known to be the same",
                let.teacher.tokenizer_path,
            )
        )
    difference = compare_vocabularies(student, teacher)
    if difference.num_differing:
        raise ConfigError(
            Problem(
                "let.teacher.path",
                f"the teacher's vocabulary is not the student's: {difference.num_differing:,} of "
                f"{difference.num_student:,} ids differ ({'; '.join(difference.examples)}). Train the student on the "
                "teacher's tokenizer (hf_assets_path), or take a teacher with the student's",
                let.teacher.path,
            )
        )


def _report(
    config: Trainer.Config,
    student: _Student,
    teacher: TeacherInfo,
    pair: LayerPair,
    stop_step: int,
    parallel_dims: ParallelDims,
) -> str:
    let: LetConfig = config.let
    steps = config.training.steps
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param if let.teacher.dtype == "auto" else let.teacher.dtype]
    num_teacher = teacher.num_trunk_params - teacher.num_embedding_params
    overhead = num_teacher / (3 * student.num_matmul_params)
    # The run with LET costs as much as `steps` plain ones when it has this many steps left to spend.
    affordable_steps = steps - overhead * stop_step
    tokens = config.training.local_batch_size * config.training.seq_len
    memory = {
        "teacher": teacher.num_trunk_params * dtype.itemsize // parallel_dims.dp_shard,
        "target": tokens * teacher.hidden_size * dtype.itemsize,
        "gradient": tokens * student.width * TORCH_DTYPE_MAP[config.training.mixed_precision_param].itemsize,
    }
    if teacher.hidden_size == student.width:
        widths = f"both of width {student.width}"
    else:
        widths = f"width {teacher.hidden_size} to {student.width} by {let.dimension_match}"
    if let.teacher.check_vocabulary:
        vocabulary = "the student's tokenizer and the teacher's agree token by token"
    else:
        vocabulary = "not compared (let.teacher.check_vocabulary = false)"
    if affordable_steps > 0:
        break_even = f"at {steps / affordable_steps:.3f}x fewer steps"
    else:
        break_even = "never: the teacher costs more than the whole plain run"
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in memory.items())
    return "\n".join(
        [
            "LET preflight",
            f"  student    {student}",
            f"  teacher    {teacher.description}: {teacher.num_layers} blocks of width {teacher.hidden_size}, "
            f"{teacher.num_trunk_params:,} parameters in its trunk, {str(dtype).removeprefix('torch.')}",
            f"  alignment  output of student block {pair.student} (layers.{pair.student}, of 0 to "
            f"{student.num_blocks - 1}) with the teacher's last layer (after the final norm), {widths}",
            f"  lambda     {let.weight:g} at step 0, {let.schedule} to 0 at step {stop_step} of {steps}",
            f"  vocabulary {vocabulary}",
            f"  memory     + {_mib(sum(memory.values()))} per rank while active: {parts}",
            f"  overhead   + {overhead:.1%} FLOPs while active: N_T / (3 N_S) = {num_teacher:,} / (3 x "
            f"{student.num_matmul_params:,}), embeddings not counted",
            f"  break-even {break_even}",
        ]
    )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
