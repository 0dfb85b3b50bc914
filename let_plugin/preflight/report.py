"""What the run will do, in lines for people: who meets whom, and what it costs."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.alignment.layer_mapping import EMBEDDING, LayerPair
from let_plugin.config import LetConfig, plan
from let_plugin.config.errors import Problem
from let_plugin.runtime import checkpoint, host
from let_plugin.teacher.base import TeacherInfo, TeacherSource
from let_plugin.teacher.retokenized import Trial, teacher_seq_len
from let_plugin.teacher.sharding import num_peers, sequence_shards, teacher_parallel_dims
from let_plugin.teacher.stored.features import Features


class Student:
    """How large the student is, read off the meta device. Raises what torchtitan raises for a bad configuration.

    Attributes:
        is_decoder: Whether it has what LET needs: blocks in `layers`, and token embeddings and head of its own. All
            other numbers but `num_params` are known of a decoder only.
    """

    num_blocks = width = num_head_params = num_matmul_params = 0

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
        self.num_params = sum(p.numel() for p in model.parameters())
        self.is_decoder = all(hasattr(model, name) for name in ("layers", "tok_embeddings", "norm", "lm_head"))
        if self.is_decoder:
            self.num_blocks = len(model.layers)
            self.width = spec.model.dim
            tied = model.tok_embeddings.weight is model.lm_head.weight
            self.num_head_params = sum(p.numel() for p in model.lm_head.parameters())
            self.num_matmul_params = self.num_params - (0 if tied else model.tok_embeddings.weight.numel())

    def __str__(self) -> str:
        blocks = f"{self.num_blocks} blocks of width {self.width}, " if self.is_decoder else ""
        return f"{self.name}: {blocks}{self.num_params:,} parameters"


@dataclass(kw_only=True)
class Facts:
    """What the checks have found out about a run. None: not known yet, or not needed.

    Attributes:
        config: What is to run.
        world_size: On how many processes.
        student, parallel_dims: Its model and its device meshes.
        student_vocabulary: Token -> id of its tokenizer; empty if it does not say.
        resumption: The checkpoint that the run goes on from.
        stop_step: S_stop.
        ended_at: The step at which the alignment has ended by the time the run starts.
        source: The teacher, or its stored states.
        pairs: What is aligned.
        trial: That of a teacher with another tokenizer, on the rank that has made it.
        vocabulary: What the comparison of the two vocabularies has found.
        problems: What is wrong.
    """

    config: Trainer.Config
    world_size: int | None
    student: Student | None = None
    parallel_dims: ParallelDims | None = None
    student_vocabulary: dict[str, int] | None = None
    resumption: checkpoint.Resumption | None = None
    stop_step: int | None = None
    ended_at: int | None = None
    source: TeacherSource | Features | None = None
    pairs: list[LayerPair] | None = None
    trial: Trial | None = None
    vocabulary: str | None = None
    problems: list[Problem] = field(default_factory=list)


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
        **({} if features else _teacher_memory(config, teacher, layers, parallel_dims)),
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


def report(facts: Facts) -> str:
    """The preflight report of a checked run, without a final line break."""
    let: LetConfig = facts.config.let
    lines = [f"  student    {facts.student}"]
    if not let.enable:
        return "\n".join(["preflight", *lines, "  LET        off: plain torchtitan"])
    if facts.ended_at is not None:
        lines.append(f"  teacher    the alignment has ended at step {facts.ended_at}; the teacher is not needed")
    elif let.target == "labels":
        lines += _auxiliary_lines(facts)
    else:
        lines += _teacher_lines(facts)
    return "\n".join(["LET preflight", *lines])


def _auxiliary_lines(facts: Facts) -> list[str]:
    """Of the control without a teacher."""
    student, pairs = facts.student, facts.pairs
    assert student and pairs
    costs = auxiliary_cost(student, pairs)
    return [
        "  teacher    none: the labels are the target, through the student's own norm and head",
        f"  blocks     {', '.join(str(pair.student) for pair in pairs)} (of 0 to {student.num_blocks - 1})",
        f"  lambda     {_describe_schedule(facts)}",
        f"  memory     + {_mib(sum(costs.memory.values()))} per rank while active",
        f"  overhead   + {costs.overhead:.1%} FLOPs while active: {student.num_head_params:,} parameters of the "
        f"head, once per block, beside the student's {student.num_matmul_params:,}",
    ]


def _teacher_lines(facts: Facts) -> list[str]:
    config, student, source, pairs = facts.config, facts.student, facts.source, facts.pairs
    assert student and source and pairs and facts.parallel_dims
    let: LetConfig = config.let
    teacher, layers = source.info, plan.teacher_layers(pairs)
    features = source if isinstance(source, Features) else None
    costs = cost(config, student, teacher, pairs, facts.parallel_dims, features)
    dtype = str(plan.teacher_dtype(config)).removeprefix("torch.")
    cut = f", cut over {facts.parallel_dims.tp} tensor-parallel ranks" if let.teacher.tensor_parallel else ""
    lines = [
        f"  teacher    {teacher.description}: {teacher.num_layers} blocks of width {teacher.hidden_size}, "
        f"{teacher.num_params_to(layers):,} parameters in its trunk, {dtype}{cut}"
    ]
    if features:
        lines += [f"  states     {line}" for line in features.describe(config, layers)]
        vocabulary: str | None = "the student's tokenizer is the one that the states were made with"
    elif let.token_alignment.enable:
        vocabulary = _describe_token_alignment(config, teacher, facts.trial)
    else:
        vocabulary = facts.vocabulary
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in costs.memory.items())
    return [
        *lines,
        *(f"  alignment  {_describe(pair, student, teacher, let)}" for pair in pairs),
        f"  lambda     {_describe_schedule(facts)}",
        f"  vocabulary {vocabulary}",
        f"  memory     + {_mib(sum(costs.memory.values()))} per rank while active: {parts}",
        f"  overhead   {_describe_overhead(facts, costs)}",
        f"  break-even {_describe_break_even(facts, costs)}",
    ]


def _describe_overhead(facts: Facts, costs: Cost) -> str:
    config, source, student = facts.config, facts.source, facts.student
    assert source and student
    if isinstance(source, Features):
        return "+ 0.0% FLOPs: the states are read, no teacher runs"
    heads = ", and the student's head once more" if config.let.target == "logits" else ""
    times = ""
    if config.let.token_alignment.enable:
        times = f" x {teacher_seq_len(config, source.info)} / {config.training.seq_len} tokens"
    return (
        f"+ {costs.overhead:.1%} FLOPs while active: N_T / (3 N_S) = {costs.num_teacher_params:,} / (3 x "
        f"{student.num_matmul_params:,}){times}{heads}, embeddings not counted"
    )


def _describe_break_even(facts: Facts, costs: Cost) -> str:
    if isinstance(facts.source, Features):
        return "at any saving of steps: the teacher ran when the states were made"
    assert facts.stop_step is not None
    speed_up = break_even(facts.config.training.steps, facts.stop_step, costs.overhead)
    if speed_up is None:
        return "never: the teacher costs more than the whole plain run"
    return f"at {speed_up:.3f}x fewer steps"


def _num_shards(parallel_dims: ParallelDims) -> int:
    """Among how many ranks a teacher's weights are divided, in whichever way."""
    return teacher_parallel_dims(parallel_dims).dp_shard


def _teacher_memory(
    config: Trainer.Config, teacher: TeacherInfo, layers: Sequence[int | str], parallel_dims: ParallelDims
) -> dict[str, int]:
    """What it is -> bytes per rank: the teacher's weights and, if `transformers` runs it, its attention mask."""
    dtype = plan.teacher_dtype(config)
    memory = {"teacher": teacher.num_params_to(layers) * dtype.itemsize // _num_shards(parallel_dims)}
    if not teacher.is_native:
        num_rows, peers = config.training.local_batch_size, num_peers(config, parallel_dims)
        num_rows = num_rows // peers if num_rows % peers == 0 else num_rows
        seq_len = config.training.seq_len
        if config.let.token_alignment.enable:
            seq_len = teacher_seq_len(config, teacher)
        # [B, 1, L, L]: boolean, and in the query's dtype while SDPA uses it.
        memory["teacher's dense attention mask"] = num_rows * seq_len**2 * (1 + dtype.itemsize)
    return memory


def _describe(pair: LayerPair, student: Student, teacher: TeacherInfo, let: LetConfig) -> str:
    width = teacher.width(pair.teacher, let.teacher.final_norm)
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


def _describe_schedule(facts: Facts) -> str:
    let: LetConfig = facts.config.let
    start = f"{let.weight:g} at step 0, {let.schedule}"
    if let.warmup_steps > 0:
        start = f"up to {let.weight:g} at step {let.warmup_steps}, then {let.schedule}"
    return f"{start} to 0 at step {facts.stop_step} of {facts.config.training.steps}"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
