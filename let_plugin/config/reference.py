"""`python -m let_plugin.config.reference` prints docs/configuration.md: every key of `[let]` and `[runtime]`."""

import ast
import inspect
import typing
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple

import tomli_w

from let_plugin.config import LetConfig, RuntimeConfig
from let_plugin.config.schema import arms, bounds_text, config_classes, default_value, describe, join, settable_fields

_PAGE = """\
# Configuration

<!-- made by `python -m let_plugin.config.reference > docs/configuration.md` -->

A TOML file names a configuration function as `base`; its tables, and then the options of the command line, overlay
what that function returns. `let-train CONFIG.toml --help` lists every key of torchtitan's own tables too,
`--help let` those of one table. A text that starts with `~/` is a path in the home folder.

## `[runtime]`

{runtime}

## `[let]`

A `[let]` table turns LET on. `teacher = "..."` is short for `teacher.path = "..."`.

{let}

## Metrics

Each is in `metrics.jsonl` and TensorBoard, next to torchtitan's own.

| Metric | What it is |
|---|---|
| `let/active` | 1 while the teacher is there, 0 from the stop step on. |
| `let/lambda` | The weight of the alignment loss in this step. |
| `let/cosine` | Mean cosine similarity over all valid tokens of the step, across ranks (tokens without a teacher state are excluded). |
| `let/cosine/S-T` | With several pairs: that of student block S and teacher layer T alone. |
| `let/aligned_fraction` | With `token_alignment`: share of the valid tokens that have a teacher state. |
| `let/grad_cosine` | Cosine between the gradients of the alignment and of the student's own loss, at the deepest aligned block. Below 0 the teacher works against the student; if that lasts, the run says so. |
| `let/grad_ratio` | Ratio of the norms of the two gradients, the alignment's to the student's. |
| `let/auxiliary_loss` | With `target = "labels"`: the mean cross-entropy of the blocks, in place of the cosine. |
| `let/distillation_loss` | With `target = "logits"`: the mean divergence of the predictions, in place of the cosine. |
| `let/teacher_tokens_per_second` | Tokens per second and rank of the teacher's forward pass alone. |
"""  # noqa: E501


class Row(NamedTuple):
    """One key of a table."""

    key: str
    type: str
    default: str
    bounds: str
    text: str


def text() -> str:
    """The page, in Markdown."""
    return _PAGE.format(runtime=_table(RuntimeConfig), let=_table(LetConfig))


def rows(cls: type, prefix: str = "") -> Iterator[Row]:
    """The keys of a table and of the tables in it; of an array of tables, its own and those of an element."""
    texts = _docstrings(cls)
    for name, hint in settable_fields(cls).items():
        key, default = join(prefix, name), default_value(cls, name)
        if is_dataclass(default):
            yield from rows(type(default), key)
            continue
        yield Row(key, _type(hint), _toml(default), bounds_text(hint), texts.get(name, ""))
        for arm in arms(hint):
            for element in config_classes(arms(typing.get_args(arm.type)[0])) if typing.get_args(arm.type) else []:
                yield from rows(element, f"{key}.N")


def _table(cls: type) -> str:
    lines = ["| Key | Type | Default | Bounds | |", "|---|---|---|---|---|"]
    for row in rows(cls):
        lines.append(f"| `{row.key}` | {row.type} | {row.default} | {row.bounds} | {row.text} |")
    return "\n".join(lines)


def _docstrings(cls: type) -> dict[str, str]:
    """Name -> the string below each field, in one line."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item, after in zip(node.body, node.body[1:], strict=False):
        match item, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                found[name] = " ".join(doc.split())
    return found


def _type(hint: Any) -> str:
    names = []
    for arm in arms(hint):
        if typing.get_origin(arm.type) is Literal:
            names += [f'`"{choice}"`' for choice in typing.get_args(arm.type)]
        elif arm.type is not NoneType:
            names.append(describe(arm.type).removeprefix("an ").removeprefix("a "))
    return " or ".join(names)


def _toml(value: Any) -> str:
    if value is None or value is MISSING:
        return "" if value is None else "required"
    return f"`{tomli_w.dumps({'value': value}).partition('= ')[2].strip() or '{}'}`"


if __name__ == "__main__":
    print(text(), end="")
