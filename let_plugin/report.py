"""What the run will do, in lines for people: who meets whom, and what it costs."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin import host, plan
from let_plugin.alignment.layer_mapping import EMBEDDING, LayerPair
from let_plugin.config import LetConfig
from let_plugin.teacher.base import TeacherInfo
from let_plugin.teacher.retokenised import Trial, teacher_seq_len
from let_plugin.teacher.sharding import sequence_shards, teacher_parallel_dims


class Student:
    """How large the student is, read off the meta device. Raises what torchtitan raises for a bad configuration."""

    def __init__(self, config: Trainer.Config) -> None:
        spec = config.model_spec
        assert spec is not None
        spec = copy.copy(spec)
        spec.model = copy.deepcopy(spec.model)  # torchtitan writes into it
        host.adapt_model_spec(spec)
        spec.model.update_from_config(config=config)
        with torch.device("meta"):
            model: Any = spec.model.build()
        self.name = f"{spec.name} {spec.flavor}"
        self.num_blocks = len(model.layers)
        self.width: int = spec.model.dim
        self.num_params = sum(p.numel() for p in model.parameters())
        tied = model.tok_embeddings.weight is model.lm_head.weight
        self.num_head_params = sum(p.numel() for p in model.lm_head.parameters())
        self.num_matmul_params = self.num_params - (0 if tied else model.tok_embeddings.weight.numel())

    def __str__(self) -> str:
        return f"{self.name}: {self.num_blocks} blocks of width {self.width}, {self.num_params:,} parameters"


def report(
    config: Trainer.Config,
    student: Student,
    teacher: TeacherInfo,
    pairs: Sequence[LayerPair],
    stop_step: int,
    parallel_dims: ParallelDims,
    trial: Trial | None = None,
) -> str:
    """The preflight report of a checked configuration, without a final line break.

    `trial` is that of a teacher with another tokenizer, on the rank that has made it.

    The overhead is the paper's FLOP bound, N_T / (3 N_S): a forward pass of the teacher (2 N_T per token) beside a
    forward and a backward pass of the student (6 N_S), N being the parameters that are multiplied.
    """
    let: LetConfig = config.let
    steps = config.training.steps
    dtype = plan.teacher_dtype(config)
    layers = plan.teacher_layers(pairs)
    num_kept = teacher.num_params_to(layers)  # blocks above the highest layer that is asked for are not there
    num_teacher = num_kept - teacher.num_embedding_params
    ratio, times = 1.0, ""
    if let.token_alignment.enable:
        length = teacher_seq_len(config, teacher)
        ratio, times = length / config.training.seq_len, f" x {length} / {config.training.seq_len} tokens"
    overhead = num_teacher / (3 * student.num_matmul_params) * ratio
    # The run with LET costs as much as `steps` plain ones when it has this many steps left to spend.
    affordable_steps = steps - overhead * stop_step
    tokens = config.training.local_batch_size * config.training.seq_len
    # The ranks of a pipeline stage share the teacher; each holds the states of its part of the sequence.
    num_shards = teacher_parallel_dims(parallel_dims).dp_shard
    tokens = tokens // sequence_shards(config, parallel_dims)
    widths = {layer: teacher.width(layer, let.teacher.final_norm) for layer in layers}
    memory = {
        "teacher": num_kept * dtype.itemsize // num_shards,
        "target": tokens * sum(widths.values()) * plan.target_dtype(config).itemsize,
        "gradient": tokens
        * len({pair.student for pair in pairs})
        * student.width
        * TORCH_DTYPE_MAP[config.training.mixed_precision_param].itemsize,
    }
    matches = [plan.dimension_match(let)(widths[pair.teacher], student.width) for pair in pairs]
    if num_learned := sum(p.numel() for match in matches for p in match.parameters() if p.requires_grad):
        # In fp32: the gathered weights and their gradient; the sharded ones, their gradient and the optimizer's state.
        memory["projector"] = num_learned * 4 * 2 + num_learned * 4 * 4 // num_shards
    if let.token_alignment.enable:
        vocabulary = _describe_token_alignment(config, teacher, trial)
    elif let.teacher.check_vocabulary:
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
            f"{num_kept:,} parameters in its trunk, {str(dtype).removeprefix('torch.')}",
            *(f"  alignment  {_describe(pair, widths[pair.teacher], student, teacher, let)}" for pair in pairs),
            f"  lambda     {_describe_schedule(let)} to 0 at step {stop_step} of {steps}",
            f"  vocabulary {vocabulary}",
            f"  memory     + {_mib(sum(memory.values()))} per rank while active: {parts}",
            f"  overhead   + {overhead:.1%} FLOPs while active: N_T / (3 N_S) = {num_teacher:,} / (3 x "
            f"{student.num_matmul_params:,}){times}, embeddings not counted",
            f"  break-even {break_even}",
        ]
    )


def report_auxiliary(config: Trainer.Config, student: Student, pairs: Sequence[LayerPair], stop_step: int) -> str:
    """The preflight report of the control without a teacher, without a final line break."""
    let: LetConfig = config.let
    blocks = ", ".join(str(pair.student) for pair in pairs)
    overhead = len(pairs) * student.num_head_params / student.num_matmul_params
    # In fp32: the gathered norm and head, and their gradient.
    memory = 2 * 4 * (student.num_head_params + student.width)
    return "\n".join(
        [
            "LET preflight",
            f"  student    {student}",
            "  teacher    none: the labels are the target, through the student's own norm and head",
            f"  blocks     {blocks} (of 0 to {student.num_blocks - 1})",
            f"  lambda     {_describe_schedule(let)} to 0 at step {stop_step} of {config.training.steps}",
            f"  memory     + {_mib(memory)} per rank while active",
            f"  overhead   + {overhead:.1%} FLOPs while active: {student.num_head_params:,} parameters of the head, "
            f"once per block, beside the student's {student.num_matmul_params:,}",
        ]
    )


def _describe(pair: LayerPair, width: int, student: Student, teacher: TeacherInfo, let: LetConfig) -> str:
    if pair.teacher == EMBEDDING:
        layer = "embedding"
    elif pair.teacher == teacher.num_layers - 1:
        layer = f"last layer ({'after' if let.teacher.final_norm else 'before'} the final norm)"
    else:
        layer = f"block {pair.teacher} (of 0 to {teacher.num_layers - 1})"
    if width == student.width and let.dimension_match == "interpolate":
        widths = f"both of width {width}"
    elif let.projector.side == "teacher":
        widths = f"width {width} to {student.width} by {let.dimension_match}"
    else:
        widths = f"width {student.width} to {width} by {let.dimension_match}"
    weight = "" if pair.weight == 1 else f", weight {pair.weight:g}"
    return (
        f"output of student block {pair.student} (layers.{pair.student}, of 0 to {student.num_blocks - 1}) with the "
        f"teacher's {layer}, {widths}, {let.loss}{weight}"
    )


def _describe_token_alignment(config: Trainer.Config, teacher: TeacherInfo, trial: Trial | None) -> str:
    if trial is None:
        return "two tokenizers, matched by bytes of text"
    seq_len, length = config.training.seq_len, teacher_seq_len(config, teacher)
    return "\n             ".join(
        [
            f"two tokenizers, matched by bytes of text; of {trial.num_rows} rows of the data:",
            f"{trial.aligned:.1%} of the tokens have a state of the teacher's, {trial.exact:.1%} one of the same end",
            f"{seq_len} tokens are {trial.mean_length:.0f} of the teacher's, {trial.max_length} at most, "
            f"with room for {length} (let.token_alignment.teacher_seq_len)",
            f"{trial.tokens_per_second:,.0f} tokens/s are retokenised by each worker (dataloader.num_workers)",
        ]
    )


def _describe_schedule(let: LetConfig) -> str:
    if let.warmup_steps == 0:
        return f"{let.weight:g} at step 0, {let.schedule}"
    return f"up to {let.weight:g} at step {let.warmup_steps}, then {let.schedule}"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
