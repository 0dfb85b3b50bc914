"""What `let-bench converge` compares: each method is a change of one configuration, for one trainer.

| name | what it is | source |
| --- | --- | --- |
| standard | without LET | |
| let | the configuration's own `[let]` table | arXiv 2602.05393 |
| rkd | logit distillation from LET's teacher, at one weight, throughout | reverse distillation, there a baseline |
| salt | the same for the first 17 % of the run, then without | arXiv 2410.18779 |
| kd_large | logit distillation throughout, from a larger teacher | arXiv 1503.02531 |
| labels | control: the block's own cross-entropy in the place of the teacher's states | arXiv 1409.5185, in kind |
| random_teacher | control: LET with a teacher whose matrices are drawn anew | |
| shuffled_targets | control: LET with each token's target that of another token | |
| gstack | without LET, from a shallow model's blocks, stacked | arXiv 2405.15319 |
| miniplm | without LET, on the documents that a teacher finds easier than a reference does | arXiv 2410.17215 |

Neither weight nor temperature of rkd and salt is known from public sources: tune the weight. The controls keep all of
LET but the teacher's knowledge, its weight as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torchtitan.trainer import Trainer

from let_plugin.alignment.registry import Registry
from let_plugin.config import LetConfig, TeacherConfig
from let_plugin.config.errors import ConfigError, Problem, lookup

SALT_FRACTION = 0.17
DISTILLATION_WEIGHT = 1.0  # where nothing is tuned: as much as the student's own loss


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What some of the methods need.

    Attributes:
        large_teacher: Of kd_large.
        selected_text: Of miniplm: what `let_plugin.bench.converge.data_selection` has written.
        shallow_blocks: Of gstack: blocks of the shallow model.
        shallow_steps: Of gstack: steps that it is trained for.
    """

    large_teacher: TeacherConfig | None = None
    selected_text: Path | None = None
    shallow_blocks: int | None = None
    shallow_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
        configure: Changes a configuration in place. ConfigError for a resource that is missing.
        weight: Which `let.weight` it has: "none"; one of its own; LET's.
        untuned_weight: Its own weight, unless another is asked for; None: the configuration's.
        variant: Which of the resources it is with, to tell two such methods apart; None: it needs none.
    """

    configure: Callable[[Trainer.Config, Resources], None]
    weight: Literal["none", "own", "let"] = "none"
    untuned_weight: float | None = None
    variant: Callable[[Resources], str] | None = None


METHODS: Registry[Method] = Registry("method", "let_plugin.methods")


def configure(config: Trainer.Config, name: str, weight: float | None, resources: Resources) -> None:
    """Makes `config`, whose `[let]` table is LET as the user wants it, a run of a method, in place.

    Args:
        config: A copy of the user's.
        name: Of the method.
        weight: Its weight, if it has one; None: its untuned one.
        resources: What it may need.
    """
    method = lookup(METHODS.get, name, key="--methods")
    method.configure(config, resources)
    if method.weight != "none":
        untuned = config.let.weight if method.untuned_weight is None else method.untuned_weight
        config.let.weight = untuned if weight is None else weight


def _standard(config: Trainer.Config, resources: Resources) -> None:
    config.let = LetConfig()


def _let(config: Trainer.Config, resources: Resources) -> None:
    config.let.enable = True
    if (config.let.target, config.let.control) != ("teacher", "none"):
        found = f"target = {config.let.target!r}, control = {config.let.control!r}"
        raise ConfigError(Problem("let", f"must be LET itself, which the others are compared with, not {found}"))


def _control(**changes: Any) -> Callable[[Trainer.Config, Resources], None]:
    def apply(config: Trainer.Config, resources: Resources) -> None:
        _let(config, resources)
        config.let = replace(config.let, **changes)

    return apply


def _distil(config: Trainer.Config, teacher: TeacherConfig, **changes: Any) -> None:
    """Logit distillation: of LET's own table only what it has in common with it."""
    own = config.let
    config.let = LetConfig(
        enable=True,
        target="logits",
        temperature=own.temperature,
        diagnosis_freq=own.diagnosis_freq,
        math_dtype=own.math_dtype,
        cuda_graphs=own.cuda_graphs,
        # Stored states are no predictions.
        teacher=replace(teacher, features="", final_norm=True, center=False),
        **changes,
    )


def _rkd(config: Trainer.Config, resources: Resources) -> None:
    _distil(config, config.let.teacher, schedule="constant", stop_fraction=1.0)


def _salt(config: Trainer.Config, resources: Resources) -> None:
    _distil(config, config.let.teacher, schedule="constant", stop_fraction=SALT_FRACTION)


def _kd_large(config: Trainer.Config, resources: Resources) -> None:
    if resources.large_teacher is None:
        raise ConfigError(Problem("--large-teacher", "missing; kd_large needs it"))
    _distil(config, resources.large_teacher, schedule="constant", stop_fraction=1.0)


def _gstack(config: Trainer.Config, resources: Resources) -> None:
    problems = [
        Problem(option, "missing; gstack needs it" if value is None else "must be at least 1", value)
        for option, value in (
            ("--gstack-blocks", resources.shallow_blocks),
            ("--gstack-steps", resources.shallow_steps),
        )
        if value is None or value < 1
    ]
    if problems:
        raise ConfigError(problems)
    config.let = LetConfig()


def _miniplm(config: Trainer.Config, resources: Resources) -> None:
    if resources.selected_text is None:
        message = "missing; miniplm needs it: python -m let_plugin.bench.converge.data_selection makes it"
        raise ConfigError(Problem("--selected-text", message))
    config.let = LetConfig()
    loader: Any = config.dataloader
    if not {"dataset", "dataset_path"} <= {field.name for field in fields(loader)}:
        message = "miniplm reads another text, and this data loader has no dataset and dataset_path to say so"
        raise ConfigError(Problem("dataloader", message))
    config.dataloader = replace(loader, dataset="text_files", dataset_path=str(resources.selected_text))


def _which_large_teacher(resources: Resources) -> str:
    assert resources.large_teacher is not None
    return " ".join(filter(None, [resources.large_teacher.spec, resources.large_teacher.path]))


def _which_shallow_model(resources: Resources) -> str:
    return f"{resources.shallow_blocks} blocks, {resources.shallow_steps} steps"


METHODS.register("standard", Method(configure=_standard))
METHODS.register("let", Method(configure=_let, weight="own"))
METHODS.register("rkd", Method(configure=_rkd, weight="own", untuned_weight=DISTILLATION_WEIGHT))
METHODS.register("salt", Method(configure=_salt, weight="own", untuned_weight=DISTILLATION_WEIGHT))
METHODS.register(
    "kd_large",
    Method(configure=_kd_large, weight="own", untuned_weight=DISTILLATION_WEIGHT, variant=_which_large_teacher),
)
METHODS.register("labels", Method(configure=_control(target="labels"), weight="let"))
METHODS.register("random_teacher", Method(configure=_control(control="random_teacher"), weight="let"))
METHODS.register("shuffled_targets", Method(configure=_control(control="shuffled_targets"), weight="let"))
METHODS.register("gstack", Method(configure=_gstack, variant=_which_shallow_model))
METHODS.register("miniplm", Method(configure=_miniplm, variant=lambda resources: str(resources.selected_text)))
