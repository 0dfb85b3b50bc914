"""From the `[let]` table to what the run will do: which schedule, which layers, which maths.

Shape legend: B batch, L sequence, D student width, E width of the teacher's states.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.alignment.layer_mapping import EMBEDDING, LAYER_MAPPINGS, LayerPair
from let_plugin.alignment.losses import Alignment, AlignmentLoss, LossEntry, alignment_of, get_loss
from let_plugin.alignment.projectors import DIMENSION_MATCHES
from let_plugin.alignment.schedules import Schedule, ScheduleEntry, get_schedule, with_warmup
from let_plugin.config import LetConfig, options
from let_plugin.config.errors import ConfigError, Problem, lookup

if TYPE_CHECKING:
    from torchtitan.config import CompileConfig
    from torchtitan.trainer import Trainer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# (hidden state [B, L, D], the teacher's states [B, L, E], coefficient 0-dim, the projector's weights) -> what the pair
# contributes, and the gradients of the weights.
PairAlign = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], tuple[Alignment, dict[str, torch.Tensor]]
]


def stop_step(config: "Trainer.Config", num_data_parallel: int) -> int:
    """S_stop: the first step (0-based) without the teacher. ConfigError if it is beyond the run or negative.

    Args:
        config: The student's configuration.
        num_data_parallel: Number of data-parallel ranks, for a stop that is given in tokens.
    """
    let: LetConfig = config.let
    steps = config.training.steps
    given = {
        name: value
        for name in ("stop_step", "stop_tokens", "stop_fraction")
        if (value := getattr(let, name)) is not None
    }
    if len(given) > 1:
        raise ConfigError([Problem(f"let.{name}", "give one of the stop_* keys only", given[name]) for name in given])
    if let.stop_tokens is not None:
        per_step = max(tokens_per_step(config, num_data_parallel), 1)
        if not 0 <= let.stop_tokens <= steps * per_step:
            message = f"must be between 0 and the tokens of the whole run, {steps * per_step}"
            raise ConfigError(Problem("let.stop_tokens", message, let.stop_tokens))
        stop = -(-let.stop_tokens // per_step)
    elif let.stop_step is not None:
        stop = let.stop_step
        if not 0 <= stop <= steps:
            raise ConfigError(Problem("let.stop_step", f"must be between 0 and training.steps = {steps}", stop))
    else:
        fraction = _schedule_entry(let).default_stop_fraction if let.stop_fraction is None else let.stop_fraction
        if not 0 <= fraction <= 1:
            raise ConfigError(Problem("let.stop_fraction", "must be between 0 and 1, a fraction of the run", fraction))
        stop = int(fraction * steps)
    if not 0 <= let.warmup_steps <= stop:
        raise ConfigError(Problem("let.warmup_steps", f"must be between 0 and the stop step, {stop}", let.warmup_steps))
    return stop


def tokens_per_step(config: "Trainer.Config", num_data_parallel: int) -> int:
    """Tokens of one optimizer step of the whole job."""
    training = config.training
    rows = (
        training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * num_data_parallel
    )
    return rows * training.seq_len


def teacher_dtype(config: "Trainer.Config") -> torch.dtype:
    """Data type of the teacher's weights and maths: `let.teacher.dtype`, or the student's."""
    name = config.let.teacher.dtype
    return _DTYPES[config.training.mixed_precision_param if name == "auto" else name]


def math_dtype(let: LetConfig) -> torch.dtype:
    """Data type of the alignment's maths."""
    return _DTYPES[let.math_dtype]


def target_dtype(config: "Trainer.Config") -> torch.dtype:
    """Data type in which the target waits for the block's output: `let.target_dtype`, or the teacher's."""
    name = config.let.target_dtype
    return teacher_dtype(config) if name == "auto" else _DTYPES[name]


def schedule(let: LetConfig) -> Schedule:
    """lambda / `let.weight` as a function of the step. ConfigError for an unknown name or a bad option."""
    function = options.bind(_schedule_entry(let).function, let.schedule_options, key="let.schedule_options")
    function(0, stop_step=1)  # refuses bad values now
    return with_warmup(function, let.warmup_steps)


def adaptive_stop(let: LetConfig) -> AdaptiveStop | None:
    """What ends the alignment before the stop step, if anything is to. ConfigError for a value out of its range."""
    settings = let.adaptive_stop
    if settings.criterion == "none":
        return None
    problems = []
    if not 0 <= settings.smoothing < 1:
        message = "must be at least 0 and less than 1"
        problems.append(Problem("let.adaptive_stop.smoothing", message, settings.smoothing))
    if settings.patience < 1:
        problems.append(Problem("let.adaptive_stop.patience", "must be at least 1", settings.patience))
    if not math.isfinite(settings.threshold):
        problems.append(Problem("let.adaptive_stop.threshold", "must be a number", settings.threshold))
    if settings.criterion == "gradient" and let.diagnosis_freq == 0:
        message = 'let.adaptive_stop.criterion = "gradient" needs what it measures: at least 1'
        problems.append(Problem("let.diagnosis_freq", message, let.diagnosis_freq))
    if settings.criterion == "validation":
        loss = settings.teacher_loss
        if loss is None and let.target == "labels":
            message = 'with let.target = "labels" there is no teacher to measure: give the loss to pass'
            problems.append(Problem("let.adaptive_stop.teacher_loss", message, loss))
        elif loss is not None and not (math.isfinite(loss) and loss > 0):
            message = "must be more than 0, in nats per token; leave it out and it is measured"
            problems.append(Problem("let.adaptive_stop.teacher_loss", message, loss))
    if problems:
        raise ConfigError(problems)
    return AdaptiveStop(threshold=settings.threshold, smoothing=settings.smoothing, patience=settings.patience)


def layer_pairs(config: "Trainer.Config", teacher_depth: int | None) -> list[LayerPair]:
    """The student's blocks and the layers of a teacher of so many blocks that meet, with indices that count from 0.

    Without a teacher (`teacher_depth` None), a mapping chooses for one as deep as the student, and the teacher's layers
    in `let.pairs` are not looked at.

    ConfigError for an unknown mapping, a bad option of it, or a layer that there is not.
    """
    let: LetConfig = config.let
    assert config.model_spec is not None
    depth = len(config.model_spec.model.layers)
    if let.pairs:
        if let.student_block is not None:
            raise ConfigError(Problem("let.student_block", "not together with let.pairs", let.student_block))
        pairs = [LayerPair(pair.student, pair.teacher, pair.weight) for pair in let.pairs]
        keys = [f"let.pairs.{i}" for i in range(len(pairs))]
        return _resolved(pairs, keys, depth, teacher_depth)
    mapping = lookup(LAYER_MAPPINGS.get, let.layer_mapping, key="let.layer_mapping")
    bound = options.bind(mapping, let.layer_mapping_options, key="let.layer_mapping_options")
    pairs = list(bound(depth, depth if teacher_depth is None else teacher_depth))
    if let.student_block is not None:
        if len(pairs) != 1:
            raise ConfigError(
                Problem(
                    "let.student_block", f"{let.layer_mapping!r} aligns {len(pairs)} blocks; choose them by let.pairs"
                )
            )
        if not 0 <= let.student_block < depth:
            raise ConfigError(
                Problem("let.student_block", f"the student has blocks 0 to {depth - 1}", let.student_block)
            )
        pairs = [LayerPair(let.student_block, pairs[0].teacher, pairs[0].weight)]
    return _resolved(pairs, ["let.layer_mapping"] * len(pairs), depth, teacher_depth)


def pairs(config: "Trainer.Config", teacher_depth: int | None) -> list[LayerPair]:
    """What the run draws to what, by `let.target`.

    ConfigError as `layer_pairs`.

    Args:
        config: The student's configuration.
        teacher_depth: Number of the teacher's blocks; None if the labels are the target.
    """
    target = config.let.target
    if target == "labels":
        return auxiliary_pairs(config)
    assert teacher_depth is not None
    return distillation_pairs(config, teacher_depth) if target == "logits" else layer_pairs(config, teacher_depth)


def auxiliary_pairs(config: "Trainer.Config") -> list[LayerPair]:
    """With `let.target = "labels"`: the blocks that are trained by themselves, each once.

    They are those that would be aligned with a teacher; the pairs' teacher layers mean nothing.
    """
    blocks: dict[int, LayerPair] = {}
    for pair in layer_pairs(config, None):
        blocks.setdefault(pair.student, pair)
    return list(blocks.values())


def distillation_pairs(config: "Trainer.Config", teacher_depth: int) -> list[LayerPair]:
    """With `let.target = "logits"`: the last block of both. ConfigError for settings that have no meaning there."""
    let: LetConfig = config.let
    problems = [
        Problem(f"let.{key}", 'let.target = "logits" compares what the two models predict; leave it out', value)
        for key, value, default in (
            ("pairs", let.pairs, []),
            ("student_block", let.student_block, None),
            ("teacher.final_norm", let.teacher.final_norm, True),
            ("teacher.center", let.teacher.center, False),
        )
        if value != default
    ]
    if not (math.isfinite(let.temperature) and let.temperature > 0):
        problems.append(Problem("let.temperature", "must be greater than 0", let.temperature))
    if problems:
        raise ConfigError(problems)
    assert config.model_spec is not None
    return [LayerPair(len(config.model_spec.model.layers) - 1, teacher_depth - 1)]


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


def loss(let: LetConfig) -> AlignmentLoss:
    """The alignment loss. ConfigError for an unknown name or a bad option."""
    entry = loss_entry(let)
    options.bind(entry.function, let.loss_options, key="let.loss_options")  # refuses bad names and types
    with options.refusals(let.loss_options, key="let.loss_options"):
        return alignment_of(entry, let.loss_options)


def loss_entry(let: LetConfig) -> LossEntry:
    """What is registered under `let.loss`. ConfigError for an unknown name."""
    return lookup(get_loss, let.loss, key="let.loss")


def alignment(
    let: LetConfig,
    match: nn.Module,
    compile_config: "CompileConfig | None" = None,
    *,
    channels: slice = slice(None),
    weight: float = 1.0,
) -> PairAlign:
    """The maths of one pair as one function, compiled if torchtitan compiles.

    Args:
        let: The `[let]` table.
        match: The dimension match, on the student's device.
        compile_config: torchtitan's.
        channels: Where the pair's layer lies in the teacher's states.
        weight: The pair's weight.
    """
    losses, dtype = loss(let), math_dtype(let)
    on_teacher = let.projector.side == "teacher"

    def align(
        student_BLD: torch.Tensor,
        teacher_BLE: torch.Tensor,
        coefficient: torch.Tensor,
        weights: dict[str, torch.Tensor],
    ) -> tuple[Alignment, dict[str, torch.Tensor]]:
        teacher_BLE = teacher_BLE[..., channels]
        counts_BL = teacher_BLE.ne(0).any(dim=-1)  # the states of tokens that do not count have been set to zero
        # The one place where the two states are brought to the dtype of the maths.
        student_BLD, teacher_BLE = student_BLD.to(dtype), teacher_BLE.to(dtype)
        if on_teacher and not weights:
            # What is not returned is not computed.
            result = losses(student_BLD, match(teacher_BLE), counts_BL, coefficient * weight)
            return result._replace(target_gradient_BLD=None), {}

        def project(weights: dict[str, torch.Tensor], hidden_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
            if not on_teacher:
                return torch.func.functional_call(match, weights, (hidden_BLD,)), teacher_BLE
            # Tokens that do not count keep a state of zeros, whatever the projector adds.
            return hidden_BLD, torch.func.functional_call(match, weights, (teacher_BLE,)) * counts_BL[..., None]

        both, backward = torch.func.vjp(project, weights, student_BLD)  # type: ignore[misc]
        result = losses(both[0], both[1], counts_BL, coefficient * weight)
        weight_gradients, gradient_BLD = backward((result.gradient_BLD, result.target_gradient_BLD))
        return result._replace(gradient_BLD=gradient_BLD, target_gradient_BLD=None), weight_gradients

    if compile_config is None or not compile_config.enable:
        return align
    # Isolated: the functions of several pairs have one code object, and would share one limit of recompilations.
    arguments = {"backend": compile_config.backend, "fullgraph": True, "isolate_recompiles": True}
    return torch.compile(align, **arguments)


def _schedule_entry(let: LetConfig) -> ScheduleEntry:
    return lookup(get_schedule, let.schedule, key="let.schedule")


def _resolved(
    pairs: Sequence[LayerPair], keys: Sequence[str], student_depth: int, teacher_depth: int | None
) -> list[LayerPair]:
    """The pairs with indices from 0. ConfigError lists every layer that there is not; `keys` name the pairs.

    Without a depth of the teacher, its layers stay as they are.
    """
    problems, result = [], []
    for key, pair in zip(keys, pairs, strict=True):
        by_hand = key != "let.layer_mapping"
        for name, index, depth in (("student", pair.student, student_depth), ("teacher", pair.teacher, teacher_depth)):
            if depth is None or index == EMBEDDING:
                continue
            if not (isinstance(index, int) and -depth <= index < depth):
                message = f"the {name} has blocks 0 to {depth - 1} (-{depth} to -1 from the end)"
                problems.append(Problem(f"{key}.{name}" if by_hand else key, message, index))
        if not (math.isfinite(pair.weight) and pair.weight >= 0):
            problems.append(Problem(f"{key}.weight" if by_hand else key, "must be 0 or more", pair.weight))
        if problems:
            continue
        is_index = isinstance(pair.teacher, int) and teacher_depth is not None
        teacher = pair.teacher % teacher_depth if is_index else pair.teacher  # type: ignore[operator]
        result.append(LayerPair(pair.student % student_depth, teacher, pair.weight))
        if any((pair.student, pair.teacher) == (result[-1].student, teacher) for pair in result[:-1]):
            problems.append(Problem(key, f"student block {result[-1].student} and teacher layer {teacher} meet twice"))
    if problems:
        raise ConfigError(problems)
    if not result:
        raise ConfigError(Problem("let.layer_mapping", "it aligns nothing: there is no pair"))
    return result
