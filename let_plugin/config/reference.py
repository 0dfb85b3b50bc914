"""`python -m let_plugin.config.reference` prints docs/configuration.md: every key of `[let]` and `[runtime]`."""

import ast
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass
from types import NoneType
from typing import Any, Literal

import tomli_w

from let_plugin.config import LetConfig, RuntimeConfig
from let_plugin.config.schema import arms, bounds_text, default_value, describe, join, settable_fields

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
"""


def text() -> str:
    """The page, in Markdown."""
    return _PAGE.format(runtime=_table(RuntimeConfig), let=_table(LetConfig))


def rows(cls: Any, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Key, type, default, bounds and text of what is in a table; of an array of tables, its own and an element's."""
    text_of = texts(cls)
    for name, hint in settable_fields(cls).items():
        key, default = join(prefix, name), default_value(cls, name)
        if is_dataclass(default):
            yield from rows(type(default), key)
            continue
        shown = "" if default is None else "required" if default is MISSING else f"`{toml(default)}`"
        yield f"`{key}`", _type(hint), shown, bounds_text(hint), text_of[name]
        for arm in arms(hint):
            for element in filter(is_dataclass, typing.get_args(arm.type)):
                yield from rows(element, f"{key}.N")


def _table(cls: type) -> str:
    head = [("Key", "Type", "Default", "Bounds", "Meaning"), ("---",) * 5]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows(cls)])


def texts(cls: Any) -> dict[str, str]:
    """Name -> the string below each field of a dataclass, in one line."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    inherited = texts(cls.__base__) if is_dataclass(cls.__base__) else {}
    return inherited | {
        ast.unparse(item.target): " ".join(ast.literal_eval(after.value).split())
        for item, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr)
    }


def _type(hint: Any) -> str:
    names = []
    for arm in arms(hint):
        if typing.get_origin(arm.type) is Literal:
            names += [f'`"{choice}"`' for choice in typing.get_args(arm.type)]
        elif arm.type is not NoneType:
            names.append(describe(arm.type).removeprefix("an ").removeprefix("a "))
    return " or ".join(names)


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    return tomli_w.dumps({"value": value}).partition("= ")[2].strip() or "{}"


if __name__ == "__main__":
    print(text(), end="")
