"""From the `[let]` table to what the run will do: which terms, which schedule, which layers, which maths."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS, LayerPair
from let_plugin.alignment.losses import AlignmentLoss, LossEntry, alignment_of, get_loss
from let_plugin.alignment.projectors import DIMENSION_MATCHES
from let_plugin.alignment.schedules import SCHEDULES, Schedule, with_warmup
from let_plugin.alignment.shared_basis import SharedBasis, shared_basis
from let_plugin.config import LetConfig, options
from let_plugin.config.errors import ConfigError, Problem, lookup, raise_if_any
from let_plugin.config.schema import settable_fields
from let_plugin.config.tables import STOPS, TermConfig

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

_DEFAULT_STOP_FRACTION = 0.5

# What a signal makes nothing of.
_OF_PAIRS = ("layer_mapping", "layer_mapping_options", "student_block", "pairs")
_OF_STATES = ("dimension_match", "dimension_match_options", "projector", "loss", "loss_options")
_OF_LOGITS = ("divergence", "temperature", "top_k", "alpha")
_UNUSED = {"states": _OF_LOGITS, "logits": (*_OF_PAIRS, *_OF_STATES), "labels": (*_OF_STATES, *_OF_LOGITS)}
_START = (*_OF_PAIRS, *_OF_STATES)  # what [let.init] takes of [let], if no term has states


@dataclass(frozen=True)
class Term:
    """A term of the loss."""

    config: TermConfig
    key: str  # of its table: "let", "let.terms.0"
    index: int
    name: str  # in metrics; empty: it is the only one

    @property
    def has_teacher(self) -> bool:
        return self.config.signal != "labels"

    def metric(self, name: str) -> str:
        """The name of one of its metrics. TensorBoard makes a folder of what is before the first slash."""
        return f"let.{self.name}/{name}" if self.name else f"let/{name}"


def terms(let: LetConfig) -> list[Term]:
    """`let.terms`, or the one that `[let]` itself is."""
    if not let.terms:
        return [Term(let, "let", 0, let.name)]
    names = [term.name or term.signal for term in let.terms]
    numbered = [f"{name}_{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]
    return [Term(term, f"let.terms.{i}", i, numbered[i]) for i, term in enumerate(let.terms)]


def teacher_terms(let: LetConfig) -> list[Term]:
    """Those that need the teacher, or its states."""
    return [term for term in terms(let) if term.has_teacher]


def check_terms(let: LetConfig) -> None:
    """ConfigError that lists every key which no term reads, and names that two terms have."""
    problems, starts = [], changes_the_start(let)
    if let.terms:
        for name in _changed(let, settable_fields(TermConfig)):
            if not (starts and name in _START):
                message = "not together with let.terms, each of which has its own; write it there"
                problems.append(Problem(f"let.{name}", message, getattr(let, name)))
    all_terms = terms(let)
    for term in all_terms:
        unused: Sequence[str] = _UNUSED[term.config.signal]
        if term.config is let:  # a comparison may leave there what another signal reads, and [let.init] reads some
            read = () if starts else ("pairs", "student_block")
            unused = [name for name in unused if name in (*_OF_LOGITS, *read)]
        for name in _changed(term.config, unused):
            message = f'has no meaning for signal = "{term.config.signal}"; leave it out'
            problems.append(Problem(f"{term.key}.{name}", message, getattr(term.config, name)))
        if any(other.name == term.name for other in all_terms[: term.index]) or not f"_{term.name}".isidentifier():
            problems.append(Problem(f"{term.key}.name", "must be letters, digits and _, not another's", term.name))
    of_logits = [term for term in all_terms if term.config.signal == "logits"]
    for term in of_logits[1:]:
        if term.config.alpha > 0:
            message = f"would scale the gradient of {of_logits[0].key} as well; give it to that term"
            problems.append(Problem(f"{term.key}.alpha", message, term.config.alpha))
    if of_logits:
        message = 'not with signal = "logits", which needs the teacher\'s last state as its head does; leave it out'
        for name in _changed(let.teacher, ("final_norm", "center")):
            problems.append(Problem(f"let.teacher.{name}", message, getattr(let.teacher, name)))
    raise_if_any(problems)


def _changed(table: object, names: Iterable[str]) -> list[str]:
    default = type(table)()
    return [name for name in names if getattr(table, name) != getattr(default, name)]


def last_step(config: "Trainer.Config", num_data_parallel: int) -> int:
    """The first step from which on no teacher is needed. ConfigError as for `stop_step`."""
    return max((stop_step(config, term, num_data_parallel) for term in teacher_terms(config.let)), default=0)


def all_teacher_layers(config: "Trainer.Config", teacher_depth: int) -> list[int | str]:
    """The teacher's layers that any term needs. ConfigError as for `pairs`."""
    return teacher_layers(pair for term in teacher_terms(config.let) for pair in pairs(config, term, teacher_depth))


def stop_step(config: "Trainer.Config", term: Term, num_data_parallel: int) -> int:
    """S_stop of a term: the first step (0-based) without it. ConfigError if it is beyond the run.

    The number of data-parallel ranks matters for a stop that is given in tokens.
    """
    let, key = term.config, term.key
    steps = config.training.steps
    given = {name: value for name in STOPS if (value := getattr(let, name)) is not None}
    if len(given) > 1:
        raise ConfigError([Problem(f"{key}.{name}", "give one of the stop_* keys only", given[name]) for name in given])
    if let.stop_tokens is not None:
        per_step = max(tokens_per_step(config, num_data_parallel), 1)
        if let.stop_tokens > steps * per_step:
            message = f"must be at most the tokens of the whole run, {steps * per_step}"
            raise ConfigError(Problem(f"{key}.stop_tokens", message, let.stop_tokens))
        stop = -(-let.stop_tokens // per_step)
    elif let.stop_step is not None:
        stop = let.stop_step
        if stop > steps:
            raise ConfigError(Problem(f"{key}.stop_step", f"must be at most training.steps = {steps}", stop))
    else:
        stop = int(part(_DEFAULT_STOP_FRACTION if let.stop_fraction is None else let.stop_fraction, steps))
    if let.warmup_steps > stop:
        raise ConfigError(Problem(f"{key}.warmup_steps", f"must be at most the stop step, {stop}", let.warmup_steps))
    return 0 if let.weight == 0 and changes_the_start(config.let) else stop


def changes_the_start(let: LetConfig) -> bool:
    """Whether `[let.init]` sets weights of a run from scratch."""
    return let.init.parts != "none" or let.init.upper_blocks != "keep"


def tokens_per_step(config: "Trainer.Config", num_data_parallel: int) -> int:
    """Tokens of one optimizer step of the whole job."""
    training = config.training
    rows = training.global_batch_size
    return (rows if rows > 0 else training.local_batch_size * num_data_parallel) * training.seq_len


def microbatch_rows(config: "Trainer.Config") -> int:
    """Rows of a forward pass of this data-parallel rank."""
    has_pipeline = config.parallelism.pipeline_parallel_degree > 1
    return config.parallelism.pipeline_parallel_microbatch_size if has_pipeline else config.training.local_batch_size


def num_teacher_rows(let: LetConfig, num_rows: int) -> int:
    """On how many of a microbatch's rows the teacher runs: `let.teacher.rows` of them, rounded up."""
    return math.ceil(part(let.teacher.rows, num_rows))


def part(share: float, num: int) -> Fraction:
    """A share, as the decimal number that was written: 0.29 of 100 is 29, though the nearest binary number is less."""
    return Fraction(str(share)) * num


def teacher_rows(let: LetConfig, step: int, num_rows: int) -> slice:
    """Which of a microbatch's rows the teacher runs on in a step (0-based): as many in each, and all rows in turn."""
    num = num_teacher_rows(let, num_rows)
    start = step % -(-num_rows // num) * num
    return slice(min(start, num_rows - num), min(start + num, num_rows))


def teacher_dtype(config: "Trainer.Config") -> torch.dtype:
    """Data type of the teacher's weights and maths: `let.teacher.dtype`, or the student's."""
    name = config.let.teacher.dtype
    return getattr(torch, config.training.mixed_precision_param if name == "auto" else name)


def schedule(term: Term) -> Schedule:
    """lambda / `weight` as a function of the step. ConfigError for an unknown name or a bad option."""
    let, key = term.config, f"{term.key}.schedule"
    registered = lookup(SCHEDULES.get, let.schedule, key=key)
    function = options.bind(registered, let.schedule_options, key=f"{key}_options")
    function(0, stop_step=1)  # refuses bad values now
    return with_warmup(function, let.warmup_steps)


def adaptive_stop(let: LetConfig, term: Term) -> AdaptiveStop | None:
    """What ends a term before its stop step, if anything is to. ConfigError if it has nothing to measure."""
    settings = term.config.adaptive_stop
    if settings.criterion == "none":
        return None
    if settings.criterion == "gradient" and let.diagnosis_freq == 0:
        message = f'must be at least 1: {term.key}.adaptive_stop.criterion = "gradient" needs what it measures'
        raise ConfigError(Problem("let.diagnosis_freq", message, let.diagnosis_freq))
    if settings.criterion == "validation" and settings.teacher_loss is None and not term.has_teacher:
        message = 'with signal = "labels" there is no teacher to measure: give the loss to pass'
        raise ConfigError(Problem(f"{term.key}.adaptive_stop.teacher_loss", message))
    return AdaptiveStop(threshold=settings.threshold, smoothing=settings.smoothing, patience=settings.patience)


def pairs(config: "Trainer.Config", term: Term, teacher_depth: int | None) -> list[LayerPair]:
    """Whom a term brings together, with indices from 0; `teacher_depth` is the teacher's number of blocks.

    With signal = "logits" these are the last blocks of both. With "labels", where `teacher_depth` is None, each block
    occurs once, and its teacher layer means nothing. ConfigError for an unknown mapping, a bad option of it, or a layer
    that does not exist.
    """
    let = term.config
    assert config.model_spec is not None
    depth = len(config.model_spec.model.layers)
    if let.signal == "logits":
        assert teacher_depth is not None
        return [LayerPair(depth - 1, teacher_depth - 1)]
    by_hand = [LayerPair(pair.student, pair.teacher, pair.weight) for pair in let.pairs]
    chosen = [(f"{term.key}.pairs.{i}", pair) for i, pair in enumerate(by_hand)]
    if not let.pairs:
        mapped = _mapped_pairs(term, depth, depth if teacher_depth is None else teacher_depth)
        chosen = [(f"{term.key}.layer_mapping", pair) for pair in mapped]
    elif let.student_block is not None:
        key = f"{term.key}.student_block"
        raise ConfigError(Problem(key, f"not together with {term.key}.pairs", let.student_block))
    if not chosen:
        raise ConfigError(Problem(f"{term.key}.layer_mapping", "it aligns nothing: there is no pair"))
    resolved = _resolved(chosen, depth, teacher_depth)
    if term.has_teacher:
        return resolved
    by_block: dict[int, LayerPair] = {}
    for pair in resolved:
        by_block.setdefault(pair.student, pair)
    return list(by_block.values())


def _mapped_pairs(term: Term, student_depth: int, teacher_depth: int) -> list[LayerPair]:
    """The pairs of `layer_mapping`, at `student_block` if that is given."""
    let, key = term.config, f"{term.key}.student_block"
    mapping = lookup(LAYER_MAPPINGS.get, let.layer_mapping, key=f"{term.key}.layer_mapping")
    bound = options.bind(mapping, let.layer_mapping_options, key=f"{term.key}.layer_mapping_options")
    mapped, block = list(bound(student_depth, teacher_depth)), let.student_block
    if block is None:
        return mapped
    if len(mapped) != 1:
        raise ConfigError(Problem(key, f"{let.layer_mapping!r} aligns {len(mapped)} blocks; give {term.key}.pairs"))
    if not 0 <= block < student_depth:
        raise ConfigError(Problem(key, f"the student has blocks 0 to {student_depth - 1}", block))
    return [LayerPair(block, mapped[0].teacher, mapped[0].weight)]


def _resolved(pairs: Sequence[tuple[str, LayerPair]], student_depth: int, teacher_depth: int | None) -> list[LayerPair]:
    """The pairs, each with the key that it comes from, with indices from 0. ConfigError lists every layer that does
    not exist. Without a depth of the teacher, its layers stay as they are."""
    problems: list[Problem] = []
    result: list[LayerPair] = []
    for key, pair in pairs:
        layers = {"student": (pair.student, student_depth), "teacher": (pair.teacher, teacher_depth)}
        wrong = []
        for name, (index, depth) in layers.items():
            if isinstance(index, int) and depth is not None and not -depth <= index < depth:
                message = f"the {name} has blocks 0 to {depth - 1} (-{depth} to -1 from the end)"
                wrong.append(Problem(key if key.endswith("layer_mapping") else f"{key}.{name}", message, index))
        student, teacher = pair.student % student_depth, pair.teacher
        if isinstance(teacher, int) and teacher_depth is not None:
            teacher %= teacher_depth
        if not wrong and any((other.student, other.teacher) == (student, teacher) for other in result):
            wrong.append(Problem(key, f"student block {student} and teacher layer {teacher} meet twice"))
        if not wrong:
            result.append(LayerPair(student, teacher, pair.weight))
        problems += wrong
    raise_if_any(problems)
    return result


def teacher_layers(pairs: Iterable[LayerPair]) -> list[int | str]:
    """The distinct teacher layers of the pairs, in the order in which the teacher is to return them: by depth."""
    return sorted({pair.teacher for pair in pairs}, key=lambda layer: layer if isinstance(layer, int) else -1)


def dimension_match(let: TermConfig, key: str = "let") -> Callable[[int, int], nn.Module]:
    """(teacher's width, student's width) -> the module that maps one to the other, by `projector.side`.

    ConfigError for an unknown name or a bad option, now or when it is called; `key` is that of the table.
    """
    make = lookup(DIMENSION_MATCHES.get, let.dimension_match, key=f"{key}.dimension_match")
    bound = options.bind(make, let.dimension_match_options, key=f"{key}.dimension_match_options")
    if let.projector.side == "teacher":
        return bound
    return lambda teacher_width, student_width: bound(student_width, teacher_width)


def start_term(let: LetConfig) -> Term:
    """The term whose blocks and dimension match `[let.init]` takes: the first of states, else what `[let]` says."""
    of_states = (term for term in terms(let) if term.config.signal == "states")
    return next(of_states, Term(TermConfig(**{name: getattr(let, name) for name in _START}), "let", 0, ""))


def basis(config: "Trainer.Config", teacher_width: int) -> SharedBasis:
    """The basis that `[let.init]` starts in: the dimension match's. ConfigError for a match that has none."""
    assert config.model_spec is not None
    term, student_width = start_term(config.let), config.model_spec.model.dim
    side = term.config.projector.side
    match = dimension_match(term.config, term.key)(teacher_width, student_width)
    try:
        return shared_basis(match, teacher_width if side == "teacher" else student_width, side=side)
    except ValueError as error:
        message = f'{error}; to start in the teacher\'s basis take "interpolate", "truncate_or_pad" or "random"'
        raise ConfigError(Problem(f"{term.key}.dimension_match", message, term.config.dimension_match)) from error


def loss(term: Term) -> AlignmentLoss:
    """The alignment loss. ConfigError for an unknown name or a bad option."""
    entry, given, key = loss_entry(term), term.config.loss_options, f"{term.key}.loss_options"
    options.bind(entry.function, given, key=key)  # refuses bad names and types
    with options.refusals(given, key=key):
        return alignment_of(entry, given)


def loss_entry(term: Term) -> LossEntry:
    """What is registered under `loss`. ConfigError for an unknown name."""
    return lookup(get_loss, term.config.loss, key=f"{term.key}.loss")


def compile_options(config: "Trainer.Config") -> dict[str, Any] | None:
    """Keyword arguments of torch.compile for the maths; None: it is not compiled."""
    return {"backend": config.compile.backend} if config.compile.enable else None
