"""What the run will do, in lines for people: who meets whom, and what it costs."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.alignment.layer_mapping import EMBEDDING, LayerPair
from let_plugin.config import LetConfig, plan
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.config.tables import TermConfig
from let_plugin.guidance.distillation import MAX_LOGITS
from let_plugin.runtime import checkpoint, host
from let_plugin.teacher.base import TeacherInfo, TeacherSource
from let_plugin.teacher.retokenized import teacher_seq_len
from let_plugin.teacher.sharding import num_peers, sequence_shards, teacher_parallel_dims
from let_plugin.teacher.stored.features import Features

# Terms of the loss, each with its pairs.
Terms = Sequence[tuple[plan.Term, Sequence[LayerPair]]]


class Student:
    """How large the student is, read off the meta device. Raises what torchtitan raises for a bad configuration.

    `is_decoder` says whether it has what LET needs: blocks in `layers`, and token embeddings and head of its own. All
    other numbers but `num_params` are known of a decoder only.
    """

    num_blocks = width = vocab_size = num_head_params = num_matmul_params = 0
    is_tied = False

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
        self.names = [name for name, _ in model.named_parameters()]
        self.num_params = sum(p.numel() for p in model.parameters())
        self.is_decoder = all(hasattr(model, name) for name in ("layers", "tok_embeddings", "norm", "lm_head"))
        if self.is_decoder:
            self.num_blocks = len(model.layers)
            self.width = spec.model.dim
            self.vocab_size = model.lm_head.out_features
            embeddings, head = (list(part.parameters()) for part in (model.tok_embeddings, model.lm_head))
            self.is_tied = any(p is q for p in embeddings for q in head)
            self.num_head_params = sum(p.numel() for p in head)
            self.num_matmul_params = self.num_params - (0 if self.is_tied else sum(p.numel() for p in embeddings))

    def __str__(self) -> str:
        blocks = f"{self.num_blocks} blocks of width {self.width}, " if self.is_decoder else ""
        return f"{self.name}: {blocks}{self.num_params:,} parameters"


@dataclass(kw_only=True)
class Facts:
    """What the checks have found out about a run. None: not known yet, or not needed."""

    config: Trainer.Config
    world_size: int | None  # number of processes
    student: Student | None = None
    parallel_dims: ParallelDims | None = None  # the student's device meshes
    student_vocabulary: dict[str, int] | None = None  # token -> id; empty if the tokenizer has none
    resumption: checkpoint.Resumption | None = None  # the checkpoint that the run goes on from
    terms: list["TermFacts"] = field(default_factory=list)
    source: TeacherSource | Features | None = None
    vocabulary: list[str] = field(default_factory=list)  # for people: how the two vocabularies are related
    start: TeacherSource | None = None  # the teacher that the student starts from
    pieces: list[list[int]] | None = None  # by the student's id, the rows of its that the token takes; on rank 0
    first_upper_block: int | None = None  # of the blocks whose output projections start at zero
    problems: list[Problem] = field(default_factory=list)

    @property
    def active_terms(self) -> list["TermFacts"]:
        """Those that have not ended by the time the run starts."""
        return [term for term in self.terms if term.ended_at is None]

    @property
    def num_data_parallel(self) -> int | None:
        """Number of data-parallel ranks."""
        dims = self.parallel_dims
        return None if dims is None else dims.dp_replicate * dims.dp_shard

    def refuse(self, key: str, message: str, *value: Any) -> None:
        """Adds a problem; two checks may find the same one."""
        problem = Problem(key, message, *value)
        if problem not in self.problems:
            self.problems.append(problem)

    def attempt(self, check: Callable[..., Any], *args: Any) -> None:
        """Calls `check` and adds the problems of its ConfigError."""
        try:
            check(*args)
        except ConfigError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]


@dataclass
class TermFacts:
    """What the checks have found out about a term of the loss. None: not known yet, or not needed."""

    term: plan.Term
    stop_step: int | None = None  # S_stop
    ended_at: int | None = None  # the step at which it has ended by the time the run starts
    pairs: list[LayerPair] | None = None


@dataclass(frozen=True)
class Cost:
    """What LET costs while it is active, beside a plain step.

    With a teacher the overhead is the paper's bound, N_T / (3 N_S): its forward pass (2 N_T per token) beside a forward
    and a backward pass of the student (6 N_S), N being the parameters that are multiplied. In logit distillation N_T
    has the teacher's head in it. The student's head runs once more for each block of a term of labels.
    """

    num_teacher_params: int  # N_T; 0 without a teacher
    tokens: float  # that the teacher runs on, for each of the student's
    overhead: float  # share of a plain step's FLOPs
    memory: dict[str, int]  # bytes per rank, by what they hold


def cost(
    config: Trainer.Config, student: Student, source: TeacherSource | Features | None, terms: Terms, dims: ParallelDims
) -> Cost:
    """The cost of terms of a checked configuration that are active together.

    With states that were made beforehand no teacher runs.
    """
    of_teacher = [(term, pairs) for term, pairs in terms if term.has_teacher]
    total = Cost(0, 0.0, 0.0, {})
    if of_teacher:
        assert source is not None
        total = _teacher_cost(config, student, source, of_teacher, dims)
    overhead, memory = total.overhead, dict(total.memory)
    if num_blocks := sum(len(pairs) for term, pairs in terms if not term.has_teacher):
        # In fp32: the gathered norm and head, and their gradient.
        memory["head"] = 2 * 4 * (student.num_head_params + student.width)
        overhead += num_blocks * student.num_head_params / student.num_matmul_params
    return replace(total, overhead=overhead, memory=memory)


def _teacher_cost(
    config: Trainer.Config, student: Student, source: TeacherSource | Features, terms: Terms, dims: ParallelDims
) -> Cost:
    let: LetConfig = config.let
    teacher, features = source.info, source if isinstance(source, Features) else None
    training, dtype = config.training, plan.teacher_dtype(config)
    layers = plan.teacher_layers(pair for _, pairs in terms for pair in pairs)
    widths = {layer: teacher.width(layer, let.teacher.final_norm) for layer in layers}
    num_tokens = training.local_batch_size * training.seq_len
    # The ranks of a pipeline stage share the teacher; each holds the states of its part of the sequence.
    num_held = num_tokens // sequence_shards(config, dims)
    num_shards = teacher_parallel_dims(dims).dp_shard
    itemsize = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    of_blocks = [(term, pair) for term, pairs in terms if term.config.signal == "states" for pair in pairs]
    num_teacher, ratio, weights = 0, 1.0, {}
    memory = {"target": num_held * sum(widths.values()) * dtype.itemsize}
    memory["gradient"] = num_held * len({pair.student for _, pair in of_blocks}) * student.width * itemsize
    if features is None:
        num_kept = teacher.num_params_to(layers)  # blocks above the highest layer that is asked for are not there
        num_teacher = num_kept - teacher.num_embedding_params
        seq_len = teacher_seq_len(config, teacher) if let.token_alignment.enable else training.seq_len
        num_rows = plan.microbatch_rows(config)
        ratio = seq_len / training.seq_len * plan.num_teacher_rows(let, num_rows) / num_rows
        weights = {"teacher": num_kept * dtype.itemsize // num_shards}
        if not teacher.is_native:
            num_rows, peers = training.local_batch_size, num_peers(config, dims)
            num_rows = num_rows // peers if num_rows % peers == 0 else num_rows
            # [B, 1, L, L]: boolean, and in the query's dtype while SDPA uses it.
            weights["teacher's dense attention mask"] = num_rows * seq_len**2 * (1 + dtype.itemsize)
    if num_terms := sum(term.config.signal == "logits" for term, _ in terms):
        num_head = num_terms * teacher.vocab_size * teacher.hidden_size  # each term has its own copy
        num_teacher += num_head
        num_chunks = getattr(config.loss, "num_chunks", 1)
        num_logits = num_tokens // dims.cp // num_chunks * student.vocab_size // dims.tp
        memory["teacher's head"] = num_head * dtype.itemsize // dims.tp
        memory["gradient"] += num_terms * num_logits * itemsize
        # In fp32: the two models' predictions, their logarithms and the gradient, of some tokens at a time.
        memory["predictions"] = 6 * 4 * min(num_logits, MAX_LOGITS)
    matches = [plan.dimension_match(term.config)(widths[pair.teacher], student.width) for term, pair in of_blocks]
    if num_learned := sum(p.numel() for match in matches for p in match.parameters() if p.requires_grad):
        # In fp32: the gathered weights and their gradient; the sharded ones, their gradient, the optimizer's state.
        memory["projector"] = num_learned * 4 * 2 + num_learned * 4 * 4 // num_shards
    if features:
        memory["encoded states"] = num_tokens * features.bytes_per_token(layers)
    return Cost(num_teacher, ratio, num_teacher / (3 * student.num_matmul_params) * ratio, weights | memory)


def report(facts: Facts) -> str:
    """The preflight report of a checked run, without a final line break."""
    let: LetConfig = facts.config.let
    lines = [("student", str(facts.student))]
    if facts.config.training.mixed_precision_param == "bfloat16" and host.emulates_bfloat16():
        text = 'bfloat16, which this CPU must emulate: training.mixed_precision_param = "float32" is many times faster'
        lines.append(("precision", text))
    if not let.enable:
        lines.append(("LET", "off: plain torchtitan"))
    elif facts.active_terms:
        lines += _guidance_lines(facts)
    else:
        ended = f"the alignment has ended at step {max(term.ended_at or 0 for term in facts.terms)}"
        ended += "; the teacher is not needed"
        if plan.changes_the_start(let) and all(facts.term.config.weight == 0 for facts in facts.terms):
            ended = "none guides the run (let.weight = 0)"
        lines.append(("teacher", ended))
    if let.enable and plan.changes_the_start(let):
        lines += _start_lines(facts)
    shown = (f"  {name:<10} {text}" for name, text in lines)
    return "\n".join(["LET preflight" if let.enable else "preflight", *shown])


def _start_lines(facts: Facts) -> list[tuple[str, str]]:
    let: LetConfig = facts.config.let
    lines = []
    if facts.start is not None:
        basis = plan.basis(facts.config, facts.start.info.hidden_size)
        match = plan.start_term(let).config.dimension_match
        scales = {"embeddings": let.init.embedding_scale, "head": let.init.head_scale or basis.logit_scale}
        parts = [
            f"{name} times {scale:.4g}" if scale else f"{name} as large as the student's own"
            for name, scale in scales.items()
            if let.init.parts in (name, "both")
        ]
        ends = f"width {basis.into_DE.shape[1]} to {basis.into_DE.shape[0]} by {match}"
        lines.append(f"{' and '.join(parts)}, {ends}, of {facts.start.info.description}")
    if facts.pieces is not None:
        sizes = [min(len(piece), 2) for piece in facts.pieces]
        own, one, several = (f"{sizes.count(n) / len(sizes):.1%}" for n in range(3))
        lines.append(f"{one} of the tokens take a row of the teacher's, {several} a mean of rows, {own} keep their own")
    if facts.first_upper_block is not None:
        lines.append(f"output projections of blocks {facts.first_upper_block} and up at 0: they pass states on")
    return [("start", line) for line in lines]


def _guidance_lines(facts: Facts) -> list[tuple[str, str]]:
    config, student, source, dims = facts.config, facts.student, facts.source, facts.parallel_dims
    assert student and dims
    active = [(facts.term, facts.pairs or []) for facts in facts.active_terms]
    costs = cost(config, student, source, active, dims)
    lines = [("teacher", "none: the labels are the target, through the student's own norm and head")]
    if source is not None:
        of_teacher = [pair for term, pairs in active if term.has_teacher for pair in pairs]
        layers, dtype = plan.teacher_layers(of_teacher), str(plan.teacher_dtype(config)).removeprefix("torch.")
        blocks = f"{source.info.num_layers} blocks of width {source.info.hidden_size}"
        trunk = f"{source.info.num_params_to(layers):,} parameters in its trunk, {dtype}"
        if config.let.teacher.tensor_parallel:
            trunk += f", cut over {dims.tp} tensor-parallel ranks"
        lines = [("teacher", f"{source.info.description}: {blocks}, {trunk}")]
        lines += [("states", source.describe(config, layers))] if isinstance(source, Features) else []
    for term, pairs in active:
        lines += [_named(term, line) for line in _term_lines(facts, term, pairs)]
    for term_facts in facts.active_terms:
        lines.append(_named(term_facts.term, ("lambda", _describe_schedule(facts, term_facts))))
    if len(active) > 1:
        alone = [(term, cost(config, student, source, [(term, pairs)], dims)) for term, pairs in active]
        lines += [_named(term, ("overhead", f"+ {own.overhead:.1%} FLOPs by itself")) for term, own in alone]
    # n steps with LET cost as much as `steps` plain ones when n + what the terms cost in theirs = steps.
    steps = config.training.steps
    affordable_steps = steps - _spent_steps(facts, active)
    break_even = "never: it costs more than the whole plain run"
    if affordable_steps > 0:
        break_even = f"at {steps / affordable_steps:.3f}x fewer steps" if costs.overhead else "at any saving of steps"
    parts = ", ".join(f"{name} {mib(size)}" for name, size in costs.memory.items())
    return [
        *lines,
        *(("vocabulary", line) for line in facts.vocabulary),
        ("memory", f"+ {mib(sum(costs.memory.values()))} per rank while active: {parts}"),
        ("overhead", f"+ {costs.overhead:.1%} FLOPs while active: {_describe_overhead(facts, student, costs)}"),
        ("break-even", break_even),
    ]


def _named(term: plan.Term, line: tuple[str, str]) -> tuple[str, str]:
    return (line[0], f"{term.name}: {line[1]}" if term.name else line[1])


def _spent_steps(facts: Facts, active: Terms) -> float:
    """How many plain steps cost as much as what the terms cost beside theirs."""
    assert facts.student and facts.parallel_dims
    spent, start = 0.0, 0
    stops = {term_facts.term.index: term_facts.stop_step or 0 for term_facts in facts.active_terms}
    for stop in sorted(set(stops.values())):
        left = [(term, pairs) for term, pairs in active if stops[term.index] >= stop]
        overhead = cost(facts.config, facts.student, facts.source, left, facts.parallel_dims).overhead
        spent, start = spent + overhead * (stop - start), stop
    return spent


def _term_lines(facts: Facts, term: plan.Term, pairs: Sequence[LayerPair]) -> list[tuple[str, str]]:
    student, let = facts.student, term.config
    assert student
    if let.signal == "labels":
        return [("blocks", f"{', '.join(str(pair.student) for pair in pairs)} (of 0 to {student.num_blocks - 1})")]
    assert facts.source is not None
    if let.signal == "logits":
        text = f"the student's predictions with the teacher's, {let.divergence} at temperature {let.temperature:g}"
        text += f", the {let.top_k} likeliest tokens" if let.top_k else ""
        sizes = student.vocab_size, facts.source.info.vocab_size
        text += f", the first {min(sizes):,} rows of each head" if sizes[0] != sizes[1] else ""
        text += f", the student's own loss times {1 - let.alpha:g} at first" if let.alpha else ""
        return [("signal", text)]
    return [("alignment", _describe_pair(pair, student, facts.source.info, facts.config.let, let)) for pair in pairs]


def _describe_overhead(facts: Facts, student: Student, costs: Cost) -> str:
    source = facts.source
    of_head = f"{student.num_head_params:,} parameters of the head, per block, beside {student.num_matmul_params:,}"
    has_labels = any(not term_facts.term.has_teacher for term_facts in facts.active_terms)
    if source is None:
        return of_head
    text = f"N_T / (3 N_S) = {costs.num_teacher_params:,} / (3 x {student.num_matmul_params:,})"
    text += f" x {costs.tokens:.4g} of the tokens" if costs.tokens != 1 else ""
    text += ", embeddings not counted"
    if isinstance(source, Features):
        head = ", its head does" if costs.num_teacher_params else ""
        text = f"the states are read, no teacher runs{head}"
    return f"{text}, and {of_head}" if has_labels else text


def _describe_pair(pair: LayerPair, student: Student, teacher: TeacherInfo, let: LetConfig, term: TermConfig) -> str:
    layer = f"block {pair.teacher} (of 0 to {teacher.num_layers - 1})"
    if pair.teacher == EMBEDDING:
        layer = "embedding"
    elif pair.teacher == teacher.num_layers - 1:
        layer = f"last layer ({'after' if let.teacher.final_norm else 'before'} the final norm)"
    width = teacher.width(pair.teacher, let.teacher.final_norm)
    if width == student.width and term.dimension_match == "interpolate":
        widths = f"both of width {width}"
    else:
        ends = (width, student.width) if term.projector.side == "teacher" else (student.width, width)
        widths = f"width {ends[0]} to {ends[1]} by {term.dimension_match}"
    weight = "" if pair.weight == 1 else f", weight {pair.weight:g}"
    return (
        f"output of student block {pair.student} (layers.{pair.student}, of 0 to {student.num_blocks - 1}) with the "
        f"teacher's {layer}, {widths}, {term.loss}{weight}"
    )


def _describe_schedule(facts: Facts, of_term: TermFacts) -> str:
    let = of_term.term.config
    start = f"{let.weight:g} at step {let.warmup_steps}"
    start = f"up to {start}, then" if let.warmup_steps else f"{start},"
    of = " of the student's own gradient" if let.weight_by == "gradient" else ""
    return f"{start} {let.schedule} to 0 at step {of_term.stop_step} of {facts.config.training.steps}{of}"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
