"""From the `[let]` table to what the run will do: which schedule, which layers, which maths."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import nn

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS, LayerPair
from let_plugin.alignment.losses import AlignmentLoss, LossEntry, alignment_of, get_loss
from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import DIMENSION_MATCHES
from let_plugin.alignment.schedules import SCHEDULES, Schedule, with_warmup
from let_plugin.alignment.shared_basis import SharedBasis, shared_basis
from let_plugin.config import LetConfig, options
from let_plugin.config.errors import ConfigError, Problem, lookup
from let_plugin.config.tables import STOPS

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

_DEFAULT_STOP_FRACTION = 0.5


def stop_step(config: "Trainer.Config", num_data_parallel: int) -> int:
    """S_stop: the first step (0-based) without the teacher. ConfigError if it is beyond the run.

    The number of data-parallel ranks matters for a stop that is given in tokens.
    """
    let: LetConfig = config.let
    steps = config.training.steps
    given = {key: value for key in STOPS if (value := getattr(let, key)) is not None}
    if len(given) > 1:
        raise ConfigError([Problem(f"let.{key}", "give one of the stop_* keys only", given[key]) for key in given])
    if let.stop_tokens is not None:
        per_step = max(tokens_per_step(config, num_data_parallel), 1)
        if let.stop_tokens > steps * per_step:
            message = f"must be at most the tokens of the whole run, {steps * per_step}"
            raise ConfigError(Problem("let.stop_tokens", message, let.stop_tokens))
        stop = -(-let.stop_tokens // per_step)
    elif let.stop_step is not None:
        stop = let.stop_step
        if stop > steps:
            raise ConfigError(Problem("let.stop_step", f"must be at most training.steps = {steps}", stop))
    else:
        # The decimal number that was written: 0.29 of 100 steps is 29, though the nearest binary number is less.
        stop = int(Fraction(str(_DEFAULT_STOP_FRACTION if let.stop_fraction is None else let.stop_fraction)) * steps)
    if let.warmup_steps > stop:
        raise ConfigError(Problem("let.warmup_steps", f"must be at most the stop step, {stop}", let.warmup_steps))
    return 0 if let.weight == 0 and changes_the_start(let) else stop


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
    return math.ceil(Fraction(str(let.teacher.rows)) * num_rows)


def teacher_rows(let: LetConfig, step: int, num_rows: int) -> slice:
    """Which of a microbatch's rows the teacher runs on in a step (0-based): as many in each, and all rows in turn."""
    num = num_teacher_rows(let, num_rows)
    start = step % -(-num_rows // num) * num
    return slice(min(start, num_rows - num), min(start + num, num_rows))


def teacher_dtype(config: "Trainer.Config") -> torch.dtype:
    """Data type of the teacher's weights and maths: `let.teacher.dtype`, or the student's."""
    name = config.let.teacher.dtype
    return getattr(torch, config.training.mixed_precision_param if name == "auto" else name)


def schedule(let: LetConfig) -> Schedule:
    """lambda / `let.weight` as a function of the step. ConfigError for an unknown name or a bad option."""
    registered = lookup(SCHEDULES.get, let.schedule, key="let.schedule")
    function = options.bind(registered, let.schedule_options, key="let.schedule_options")
    function(0, stop_step=1)  # refuses bad values now
    return with_warmup(function, let.warmup_steps)


def adaptive_stop(let: LetConfig) -> AdaptiveStop | None:
    """What ends the alignment before the stop step, if anything is to. ConfigError if it has nothing to measure."""
    settings = let.adaptive_stop
    if settings.criterion == "none":
        return None
    if settings.criterion == "gradient" and let.diagnosis_freq == 0:
        message = 'must be at least 1: let.adaptive_stop.criterion = "gradient" needs what it measures'
        raise ConfigError(Problem("let.diagnosis_freq", message, let.diagnosis_freq))
    if settings.criterion == "validation" and settings.teacher_loss is None and let.target == "labels":
        message = 'with let.target = "labels" there is no teacher to measure: give the loss to pass'
        raise ConfigError(Problem("let.adaptive_stop.teacher_loss", message))
    return AdaptiveStop(threshold=settings.threshold, smoothing=settings.smoothing, patience=settings.patience)


def pairs(config: "Trainer.Config", teacher_depth: int | None) -> list[LayerPair]:
    """Which student blocks the run draws to which teacher layers, with indices that count from 0.

    With `let.target = "logits"` these are the last blocks of both. With "labels", where `teacher_depth` is None, each
    block occurs once, and its teacher layer means nothing. ConfigError for an unknown mapping, a bad option of it, a
    layer that does not exist, or settings that have no meaning for the target.
    """
    let: LetConfig = config.let
    assert config.model_spec is not None
    depth = len(config.model_spec.model.layers)
    if let.target == "logits":
        assert teacher_depth is not None
        _refuse_what_logits_do_not_use(let)
        return [LayerPair(depth - 1, teacher_depth - 1)]
    by_hand = [LayerPair(pair.student, pair.teacher, pair.weight) for pair in let.pairs]
    chosen = [(f"let.pairs.{i}", pair) for i, pair in enumerate(by_hand)]
    if not let.pairs:
        mapped = _mapped_pairs(let, depth, depth if teacher_depth is None else teacher_depth)
        chosen = [("let.layer_mapping", pair) for pair in mapped]
    elif let.student_block is not None:
        raise ConfigError(Problem("let.student_block", "not together with let.pairs", let.student_block))
    resolved = _resolved(chosen, depth, teacher_depth)
    if let.target != "labels":
        return resolved
    by_block: dict[int, LayerPair] = {}
    for pair in resolved:
        by_block.setdefault(pair.student, pair)
    return list(by_block.values())


def _mapped_pairs(let: LetConfig, student_depth: int, teacher_depth: int) -> list[LayerPair]:
    """The pairs of `let.layer_mapping`, at `let.student_block` if that is given."""
    mapping = lookup(LAYER_MAPPINGS.get, let.layer_mapping, key="let.layer_mapping")
    bound = options.bind(mapping, let.layer_mapping_options, key="let.layer_mapping_options")
    mapped, block = list(bound(student_depth, teacher_depth)), let.student_block
    if block is None:
        return mapped
    if len(mapped) != 1:
        message = f"{let.layer_mapping!r} aligns {len(mapped)} blocks; choose them by let.pairs"
        raise ConfigError(Problem("let.student_block", message))
    if not 0 <= block < student_depth:
        raise ConfigError(Problem("let.student_block", f"the student has blocks 0 to {student_depth - 1}", block))
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
                wrong.append(Problem(key if key == "let.layer_mapping" else f"{key}.{name}", message, index))
        student, teacher = pair.student % student_depth, pair.teacher
        if isinstance(teacher, int) and teacher_depth is not None:
            teacher %= teacher_depth
        if not wrong and any((other.student, other.teacher) == (student, teacher) for other in result):
            wrong.append(Problem(key, f"student block {student} and teacher layer {teacher} meet twice"))
        if not wrong:
            result.append(LayerPair(student, teacher, pair.weight))
        problems += wrong
    if not pairs:
        problems.append(Problem("let.layer_mapping", "it aligns nothing: there is no pair"))
    if problems:
        raise ConfigError(problems)
    return result


def _refuse_what_logits_do_not_use(let: LetConfig) -> None:
    message = 'let.target = "logits" compares what the two models predict; leave it out'
    getters = {key: attrgetter(key) for key in ("pairs", "student_block", "teacher.final_norm", "teacher.center")}
    changed = {key: get(let) for key, get in getters.items() if get(let) != get(LetConfig())}
    if changed:
        raise ConfigError([Problem(f"let.{key}", message, value) for key, value in changed.items()])


def teacher_layers(pairs: Sequence[LayerPair]) -> list[int | str]:
    """The distinct teacher layers of the pairs, in the order in which the teacher is to return them."""
    return list(dict.fromkeys(pair.teacher for pair in pairs))


def dimension_match(let: LetConfig) -> Callable[[int, int], nn.Module]:
    """(teacher's width, student's width) -> the module that maps one to the other, by `let.projector.side`.

    ConfigError for an unknown name or a bad option, now or when it is called.
    """
    make = lookup(DIMENSION_MATCHES.get, let.dimension_match, key="let.dimension_match")
    bound = options.bind(make, let.dimension_match_options, key="let.dimension_match_options")
    if let.projector.side == "teacher":
        return bound
    return lambda teacher_width, student_width: bound(student_width, teacher_width)


def basis(config: "Trainer.Config", teacher_width: int) -> SharedBasis:
    """The basis that `[let.init]` starts in: the dimension match's. ConfigError for a match that has none."""
    let: LetConfig = config.let
    assert config.model_spec is not None
    student_width = config.model_spec.model.dim
    match = dimension_match(let)(teacher_width, student_width)
    in_width = teacher_width if let.projector.side == "teacher" else student_width
    try:
        return shared_basis(match, in_width, side=let.projector.side)
    except ValueError as error:
        message = f'{error}; to start in the teacher\'s basis take "interpolate", "truncate_or_pad" or "random"'
        raise ConfigError(Problem("let.dimension_match", message, let.dimension_match)) from error


def loss(let: LetConfig) -> AlignmentLoss:
    """The alignment loss. ConfigError for an unknown name or a bad option."""
    entry = loss_entry(let)
    options.bind(entry.function, let.loss_options, key="let.loss_options")  # refuses bad names and types
    with options.refusals(let.loss_options, key="let.loss_options"):
        return alignment_of(entry, let.loss_options)


def loss_entry(let: LetConfig) -> LossEntry:
    """What is registered under `let.loss`. ConfigError for an unknown name."""
    return lookup(get_loss, let.loss, key="let.loss")


def pair_alignment(
    config: "Trainer.Config", match: nn.Module, *, channels: slice = slice(None), weight: float = 1.0
) -> PairAlignment:
    """The maths of one pair (see PairAlignment), compiled if torchtitan compiles."""
    let: LetConfig = config.let
    return PairAlignment(
        match,
        loss(let),
        dtype=getattr(torch, let.math_dtype),
        side=let.projector.side,
        channels=channels,
        weight=weight,
        compile_options={"backend": config.compile.backend} if config.compile.enable else None,
    )
