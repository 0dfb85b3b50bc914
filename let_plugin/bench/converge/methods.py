"""What `let-bench converge` compares: each method is a name with options of let-train.

Public sources do not give weight or temperature of rkd and salt: tune the weight. The controls keep all of LET but
the teacher's knowledge, and take its tuned settings.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from let_plugin.bench.rows import BASELINE
from let_plugin.config.errors import ConfigError, Problem, raise_if_any, suggest
from let_plugin.config.load import read_toml
from let_plugin.config.overlay import Overlay

WEIGHT = "let.weight"
_OFF = "--let.no-enable"

# A grid: key of let-train -> the values to choose from, as on its command line.
Grid = Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train: options of let-train."""

    name: str
    options: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()  # before the options, which a grid may override
    like: str = ""  # the method whose tuned settings it takes; empty: it is tuned by itself
    grid: Grid | None = field(default=None, hash=False)  # what it is tuned over; None: the grid of the command line
    asked: str = ""  # its name as it was asked for, with a weight (let@0.1)
    needs: tuple[str, ...] = ()  # arguments of let-bench that it cannot be run without

    def tuned_over(self, grid: Grid) -> dict[str, Sequence[str]]:
        """What of the grid applies: no key that its options set, and no key of LET without LET."""
        fixed = {_key(option) for option in self.options if option.startswith("--")}
        is_off = _OFF in self.options
        own = grid if self.grid is None else self.grid
        return {k: v for k, v in own.items() if k not in fixed and not (is_off and k.startswith("let."))}


_DISTIL = (
    *("--let.enable", "--let.signal", "logits", "--let.control", "none", "--let.schedule", "constant"),
    *("--let.warmup-steps", "0", "--let.adaptive-stop.criterion", "none", "--let.dimension-match", "interpolate"),
    # Layers have no meaning here, and stored states are no predictions.
    *("--let.pairs", "[]", "--let.student-block", "None", "--let.teacher.features", ""),
    *("--let.teacher.final-norm", "--let.teacher.no-center", "--let.stop-step", "None", "--let.stop-tokens", "None"),
)
_WEIGHT_1 = (f"--{WEIGHT}", "1.0")  # as much as the student's own loss
_LET = ("--let.enable",)

METHODS = {
    method.name: method
    for method in (
        Method(name=BASELINE, options=(_OFF,)),
        Method(name="let", options=_LET),
        # Logit distillation from LET's teacher: throughout (the reverse distillation that arXiv 2602.05393 compares LET
        # with), and for the first 17 % of the run (arXiv 2410.18779).
        Method(name="rkd", options=_DISTIL, defaults=(*_WEIGHT_1, "--let.stop-fraction", "1.0")),
        Method(name="salt", options=_DISTIL, defaults=(*_WEIGHT_1, "--let.stop-fraction", "0.17")),
        # The controls; the first is similar to arXiv 1409.5185.
        Method(name="labels", options=(*_LET, "--let.signal", "labels"), like="let"),
        Method(name="random_teacher", options=(*_LET, "--let.control", "random_teacher"), like="let"),
        Method(name="shuffled_targets", options=(*_LET, "--let.control", "shuffled_targets"), like="let"),
        # arXiv 2405.15319; see `stacking`.
        Method(name="gstack", options=(_OFF,), needs=("gstack_blocks", "gstack_steps")),
    )
}


@dataclass(kw_only=True)
class _Entry:
    """A method in a file."""

    base: str = ""
    options: list[str] = field(default_factory=list)
    like: str = ""
    grid: dict[str, list[str | int | float]] = field(default_factory=dict)


def read_file(path: Path) -> dict[str, Method]:
    """Methods of a TOML file beside the built-in ones, which it may replace. ConfigError lists what is wrong.

    An entry is `name = ["--key", "value", ...]`, or a table: `options` after those of `base`, `like` and `grid`.
    """
    found, overlay, named = dict(METHODS), Overlay(str(path)), list[tuple[str, str]]()
    for name, given in read_toml(path).items():
        entry = overlay.value(name, given if isinstance(given, dict) else {"options": given}, _Entry, _Entry())
        grid = {_key(key): list(map(_word, values)) for key, values in entry.grid.items()} or None
        base = found.get(entry.base, Method(name=name))
        found[name] = replace(base, name=name, options=(*base.options, *entry.options), like=entry.like, grid=grid)
        named += [(f"{name}.base", entry.base), (f"{name}.like", entry.like)]
    wrong = [(key, method) for key, method in named if method and method not in found]
    problems = [Problem(key, f"unknown method; {suggest(method, found)}", method, str(path)) for key, method in wrong]
    raise_if_any([*overlay.problems, *problems])
    return found


def parse(text: str, known: Mapping[str, Method]) -> Method:
    """The method of an entry of `--methods`, out of the `known` ones. ConfigError if there is no such method.

    `text` is NAME; NAME@WEIGHT, at that `let.weight`; or 'NEW = NAME --key value ...', which adds options to one.
    """
    new, equals, definition = text.partition("=")
    if equals and not new.strip().startswith("-"):
        try:
            base, *options = shlex.split(definition)
        except ValueError as error:
            message = f"expected 'NAME = METHOD --key value ...': {error}"
            raise ConfigError(Problem("--methods", message, text)) from error
        if "@" in new:
            raise ConfigError(Problem("--methods", "a name of your own has no @: labels add the weight to it", text))
        method = parse(base, known)
        return replace(method, name=new.strip(), options=(*method.options, *options), asked="")
    name, at, weight = text.partition("@")
    if name not in known:
        raise ConfigError(Problem("--methods", f"unknown method; {suggest(name, known)}", text))
    method = known[name]
    if at and _OFF in method.options:
        raise ConfigError(Problem("--methods", f"{name} has no weight", text))
    return replace(method, options=(*method.options, f"--{WEIGHT}", weight), asked=text) if at else method


def _word(value: str | int | float) -> str:
    """As one writes it on a command line: 10.0 is 10, the same run."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _key(option: str) -> str:
    return option.partition("=")[0].removeprefix("--").replace("-", "_")
