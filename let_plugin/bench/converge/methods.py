"""What `let-bench converge` compares: each method is a name with options of let-train.

| name | what it is | source |
| --- | --- | --- |
| standard | without LET | |
| let | the configuration's own `[let]` table | arXiv 2602.05393 |
| rkd | logit distillation from LET's teacher, at one weight, throughout | reverse distillation, there a baseline |
| salt | the same for the first 17 % of the run, then without | arXiv 2410.18779 |
| labels | control: the block's own cross-entropy in place of the teacher's states | similar to arXiv 1409.5185 |
| random_teacher | control: LET with a teacher whose matrices are drawn anew | |
| shuffled_targets | control: LET with each token's target taken from another token | |
| gstack | without LET, starting from the stacked blocks of a shallow model | arXiv 2405.15319 |
| miniplm | without LET, on the documents that a teacher finds easier than a reference does | arXiv 2410.17215 |

Public sources do not give weight or temperature of rkd and salt: tune the weight. The controls keep all of LET but
the teacher's knowledge, and take its tuned settings.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli

from let_plugin.bench.rows import BASELINE
from let_plugin.config.errors import ConfigError, Problem, suggest

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

    def tuned_over(self, grid: Grid) -> dict[str, Sequence[str]]:
        """What of the grid applies: no key that its options set, and no key of LET without LET."""
        fixed = {_key(option) for option in self.options if option.startswith("--")}
        is_off = _OFF in self.options
        own = grid if self.grid is None else self.grid
        return {k: v for k, v in own.items() if k not in fixed and not (is_off and k.startswith("let."))}


_DISTIL = (
    *("--let.enable", "--let.target", "logits", "--let.control", "none", "--let.schedule", "constant"),
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
        Method(name="rkd", options=_DISTIL, defaults=(*_WEIGHT_1, "--let.stop-fraction", "1.0")),
        Method(name="salt", options=_DISTIL, defaults=(*_WEIGHT_1, "--let.stop-fraction", "0.17")),
        Method(name="labels", options=(*_LET, "--let.target", "labels"), like="let"),
        Method(name="random_teacher", options=(*_LET, "--let.control", "random_teacher"), like="let"),
        Method(name="shuffled_targets", options=(*_LET, "--let.control", "shuffled_targets"), like="let"),
        Method(name="gstack", options=(_OFF,)),
        Method(name="miniplm", options=(_OFF, "--dataloader.dataset", "text_files")),
    )
}


def read_file(path: Path) -> dict[str, Method]:
    """Methods of a TOML file beside the built-in ones, which it may replace.

    An entry is `name = ["--key", "value", ...]`, or a table with `options`, `like` and `grid`, of which `grid` is a
    table of key = [values]. ConfigError lists what is wrong.
    """
    try:
        content = tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise ConfigError(Problem("--methods-file", f"cannot be read: {error}", str(path))) from error
    found, problems = dict(METHODS), []
    for name, entry in content.items():
        table: dict[str, Any] = entry if isinstance(entry, dict) else {"options": entry}
        grid = table.get("grid")
        right = table.keys() <= {"options", "like", "grid"} and _is_list(table.get("options", []), str)
        right = right and isinstance(table.get("like", ""), str) and (grid is None or isinstance(grid, dict))
        if not right or any(not _is_list(values, (str, int, float)) for values in (grid or {}).values()):
            message = "expected a list of let-train options, or a table of options, like and grid"
            problems.append(Problem(f"--methods-file: {name}", message, entry))
            continue
        grid = grid and {_key(key): [str(value) for value in values] for key, values in grid.items()}
        options = tuple(table.get("options", []))
        found[name] = Method(name=name, options=options, like=table.get("like", ""), grid=grid)
    problems += [
        Problem(f"--methods-file: {method.name}.like", f"unknown method; {suggest(method.like, found)}", method.like)
        for method in found.values()
        if method.like and method.like not in found
    ]
    if problems:
        raise ConfigError(problems)
    return found


def parse(text: str, known: Mapping[str, Method]) -> Method:
    """The method of an entry of `--methods`. ConfigError if there is no such method.

    Args:
        text: NAME; NAME@WEIGHT, at that `let.weight`; or 'NEW = NAME --key value ...', which adds options to one.
        known: Name -> method.
    """
    new, equals, definition = text.partition("=")
    if equals and not new.strip().startswith("-"):
        base, *options = shlex.split(definition)
        return replace(parse(base, known), name=new.strip(), options=(*parse(base, known).options, *options))
    name, at, weight = text.partition("@")
    if name not in known:
        raise ConfigError(Problem("--methods", f"unknown method; {suggest(name, known)}", text))
    method = known[name]
    if not at:
        return method
    try:
        is_weight = 0 < float(weight) < float("inf")
    except ValueError:
        is_weight = False
    if not is_weight or _OFF in method.options:
        message = f"{name} has no weight" if _OFF in method.options else "the weight must be a number above 0"
        raise ConfigError(Problem("--methods", message, text))
    return replace(method, options=(*method.options, f"--{WEIGHT}", weight), asked=text)


def _is_list(value: Any, types: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, types) for element in value)


def _key(option: str) -> str:
    return option.partition("=")[0].removeprefix("--").replace("-", "_")
