"""What the run will do, in lines for people: who meets whom, and what it costs."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.alignment.layer_mapping import EMBEDDING, LayerPair
from let_plugin.config import LetConfig, TeacherConfig, plan
from let_plugin.runtime import host
from let_plugin.teacher.base import TeacherInfo, num_blocks_to
from let_plugin.teacher.retokenized import Trial, teacher_seq_len
from let_plugin.teacher.sharding import sequence_shards, teacher_parallel_dims
from let_plugin.teacher.stored.features import Features


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


@dataclass(frozen=True)
class Cost:
    """What LET costs while it is active, beside a plain step.

    Attributes:
        num_teacher_params: N_T: the parameters that the teacher multiplies; 0 without one.
        overhead: Share of a plain step's FLOPs. With a teacher the paper's bound, N_T / (3 N_S): its forward pass
            (2 N_T per token) beside a forward and a backward pass of the student (6 N_S), N being the parameters that
            are multiplied. In logit distillation N_T has the teacher's head in it, and the student's is used twice.
        memory: Bytes per rank, by what they hold.
    """

    num_teacher_params: int
    overhead: float
    memory: dict[str, int]


def cost(
    config: Trainer.Config,
    student: Student,
    teacher: TeacherInfo,
    pairs: Sequence[LayerPair],
    parallel_dims: ParallelDims,
    features: Features | None = None,
) -> Cost:
    """The cost of a checked configuration. With states that were made beforehand, `features`, no teacher runs."""
    let: LetConfig = config.let
    dtype = plan.teacher_dtype(config)
    layers = plan.teacher_layers(pairs)
    num_kept = teacher.num_params_to(layers)  # blocks above the highest layer that is asked for are not there
    num_teacher = 0 if features else num_kept - teacher.num_embedding_params
    # Of the teacher's tokens to the student's.
    ratio = 1.0
    if let.token_alignment.enable and not features:
        ratio = teacher_seq_len(config, teacher) / config.training.seq_len
    tokens = config.training.local_batch_size * config.training.seq_len
    # The ranks of a pipeline stage share the teacher; each holds the states of its part of the sequence.
    num_shards = _num_shards(parallel_dims)
    tokens = tokens // sequence_shards(config, parallel_dims)
    widths = {layer: teacher.width(layer, let.teacher.final_norm) for layer in layers}
    memory = {
        **({} if features else _teacher_memory(let.teacher, teacher, layers, dtype, parallel_dims)),
        "target": tokens * sum(widths.values()) * dtype.itemsize,
        "gradient": tokens
        * len({pair.student for pair in pairs})
        * student.width
        * TORCH_DTYPE_MAP[config.training.mixed_precision_param].itemsize,
    }
    overhead = 0.0
    matches = []
    if let.target == "logits":
        num_head = teacher.vocab_size * teacher.hidden_size
        num_teacher += num_head
        own_head = auxiliary_cost(student, pairs)
        overhead = own_head.overhead
        memory |= {"teacher's head": num_head * dtype.itemsize, **own_head.memory}
    else:
        matches = [plan.dimension_match(let)(widths[pair.teacher], student.width) for pair in pairs]
    if num_learned := sum(p.numel() for match in matches for p in match.parameters() if p.requires_grad):
        # In fp32: the gathered weights and their gradient; the sharded ones, their gradient and the optimizer's state.
        memory["projector"] = num_learned * 4 * 2 + num_learned * 4 * 4 // num_shards
    if features:
        memory["encoded states"] = (
            config.training.local_batch_size * config.training.seq_len * features.bytes_per_token(layers)
        )
    overhead += num_teacher / (3 * student.num_matmul_params) * ratio
    return Cost(num_teacher, overhead, memory)


def auxiliary_cost(student: Student, pairs: Sequence[LayerPair]) -> Cost:
    """The cost of the control without a teacher: the head once more for each block."""
    # In fp32: the gathered norm and head, and their gradient.
    memory = {"head": 2 * 4 * (student.num_head_params + student.width)}
    return Cost(0, len(pairs) * student.num_head_params / student.num_matmul_params, memory)


def break_even(steps: int, stop_step: int, overhead: float) -> float | None:
    """How many times fewer steps LET must need to cost no more than `steps` plain ones; None: it cannot.

    Args:
        steps: Steps of the plain run.
        stop_step: Steps with the teacher, of the run with LET.
        overhead: What such a step costs more, as a share of a plain one.
    """
    # The run with LET costs as much as `steps` plain ones when it has this many steps to spend.
    affordable_steps = steps - overhead * stop_step
    return steps / affordable_steps if affordable_steps > 0 else None


def report(
    config: Trainer.Config,
    student: Student,
    teacher: TeacherInfo,
    pairs: Sequence[LayerPair],
    stop_step: int,
    parallel_dims: ParallelDims,
    *,
    vocabulary: str | None = None,
    features: Features | None = None,
    trial: Trial | None = None,
) -> str:
    """The preflight report of a checked configuration, without a final line break.

    Args:
        vocabulary: What the comparison of the two vocabularies has found, where they were compared.
        features: The states that were made beforehand, if they are the source.
        trial: That of a teacher with another tokenizer, on the rank that has made it.
    """
    let: LetConfig = config.let
    steps = config.training.steps
    costs = cost(config, student, teacher, pairs, parallel_dims, features)
    layers = plan.teacher_layers(pairs)
    num_kept, dtype = teacher.num_params_to(layers), plan.teacher_dtype(config)
    widths = {layer: teacher.width(layer, let.teacher.final_norm) for layer in layers}
    if features:
        vocabulary = "the student's tokenizer is the one that the states were made with"
    elif let.token_alignment.enable:
        vocabulary = _describe_token_alignment(config, teacher, trial)
    speed_up = break_even(steps, stop_step, costs.overhead)
    if features:
        break_even_line = "at any saving of steps: the teacher ran when the states were made"
    elif speed_up is not None:
        break_even_line = f"at {speed_up:.3f}x fewer steps"
    else:
        break_even_line = "never: the teacher costs more than the whole plain run"
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in costs.memory.items())
    heads = ", and the student's head once more" if let.target == "logits" else ""
    times = ""
    if let.token_alignment.enable:
        times = f" x {teacher_seq_len(config, teacher)} / {config.training.seq_len} tokens"
    overhead = (
        f"+ {costs.overhead:.1%} FLOPs while active: N_T / (3 N_S) = {costs.num_teacher_params:,} / (3 x "
        f"{student.num_matmul_params:,}){times}{heads}, embeddings not counted"
    )
    states = []
    if features:
        overhead = "+ 0.0% FLOPs: the states are read, no teacher runs"
        states = [f"  states     {line}" for line in features.describe(config, layers)]
    cut = f", cut over {parallel_dims.tp} tensor-parallel ranks" if let.teacher.tensor_parallel else ""
    offloaded = []
    if let.teacher.cpu_offload and not features:
        num_bytes = num_kept * dtype.itemsize // _num_shards(parallel_dims)
        offloaded = [f"  offloaded  {_mib(num_bytes)} of the teacher per rank to CPU memory"]
    return "\n".join(
        [
            "LET preflight",
            f"  student    {student}",
            f"  teacher    {teacher.description}: {teacher.num_layers} blocks of width {teacher.hidden_size}, "
            f"{num_kept:,} parameters in its trunk, {str(dtype).removeprefix('torch.')}{cut}",
            *states,
            *(f"  alignment  {_describe(pair, widths[pair.teacher], student, teacher, let)}" for pair in pairs),
            f"  lambda     {_describe_schedule(let)} to 0 at step {stop_step} of {steps}",
            f"  vocabulary {vocabulary}",
            f"  memory     + {_mib(sum(costs.memory.values()))} per rank while active: {parts}",
            *offloaded,
            f"  overhead   {overhead}",
            f"  break-even {break_even_line}",
        ]
    )


def report_auxiliary(config: Trainer.Config, student: Student, pairs: Sequence[LayerPair], stop_step: int) -> str:
    """The preflight report of the control without a teacher, without a final line break."""
    let: LetConfig = config.let
    blocks = ", ".join(str(pair.student) for pair in pairs)
    costs = auxiliary_cost(student, pairs)
    return "\n".join(
        [
            "LET preflight",
            f"  student    {student}",
            "  teacher    none: the labels are the target, through the student's own norm and head",
            f"  blocks     {blocks} (of 0 to {student.num_blocks - 1})",
            f"  lambda     {_describe_schedule(let)} to 0 at step {stop_step} of {config.training.steps}",
            f"  memory     + {_mib(sum(costs.memory.values()))} per rank while active",
            f"  overhead   + {costs.overhead:.1%} FLOPs while active: {student.num_head_params:,} parameters of the "
            f"head, once per block, beside the student's {student.num_matmul_params:,}",
        ]
    )


def _num_shards(parallel_dims: ParallelDims) -> int:
    """Among how many ranks a teacher's weights are divided, in whichever way."""
    return teacher_parallel_dims(parallel_dims).dp_shard


def _teacher_memory(
    config: TeacherConfig,
    teacher: TeacherInfo,
    layers: Sequence[int | str],
    dtype: torch.dtype,
    parallel_dims: ParallelDims,
) -> dict[str, int]:
    """What it is -> bytes that the teacher's weights take on each rank's device."""
    num_kept = teacher.num_params_to(layers)
    if config.quantization != "none":
        num_linear = teacher.num_linear_params_to(layers)  # one byte each; the scales are one per row
        return {f"teacher ({config.quantization}, not sharded)": (num_kept - num_linear) * dtype.itemsize + num_linear}
    if config.cpu_offload:
        # A block runs while the next one is on its way; before the first, the embedding has run.
        block = max(teacher.block_params[: num_blocks_to(layers)])
        num_gathered = block + max(block, teacher.num_embedding_params)
        num_cuts = parallel_dims.tp if config.tensor_parallel else 1
        return {"teacher (gathered)": num_gathered * dtype.itemsize // num_cuts}
    return {"teacher": num_kept * dtype.itemsize // _num_shards(parallel_dims)}


def report_ended(student: Student, stop_step: int) -> str:
    """The preflight report of a run without a step before the end of the alignment, without a final line break."""
    return "\n".join(
        [
            "LET preflight",
            f"  student    {student}",
            f"  teacher    the alignment has ended at step {stop_step}; the teacher is not needed",
        ]
    )


def _describe(pair: LayerPair, width: int, student: Student, teacher: TeacherInfo, let: LetConfig) -> str:
    if let.target == "logits":
        return f"the student's predictions with the teacher's, at temperature {let.temperature:g}"
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
            f"{trial.tokens_per_second:,.0f} tokens/s are retokenized by each worker (dataloader.num_workers)",
        ]
    )


def _describe_schedule(let: LetConfig) -> str:
    if let.warmup_steps == 0:
        return f"{let.weight:g} at step 0, {let.schedule}"
    return f"up to {let.weight:g} at step {let.warmup_steps}, then {let.schedule}"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
