"""The options of the command line as TOML tables, judged as those of a file; tyro prints the help.

`--section.key VALUE` and `--section.key=VALUE` set a key, `--section.flag` and `--section.no-flag` a boolean,
`activation-checkpoint:full` the type of a section that is a choice. Dashes and underscores are the same.
"""

import contextlib
import copy
import dataclasses
import functools
import signal
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import tomli

from let_plugin.config.errors import ConfigError, Problem, suggest
from let_plugin.config.schema import arms, walk

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

SOURCE = "command line"


class Argument(list[str]):
    """The words after an option. What they mean depends on the type of the field."""

    def readings(self) -> Iterator[Any]:
        """What they can stand for, the likeliest first: a TOML value, plain text, an array of either."""
        if not self:
            yield True  # a flag
            return
        with contextlib.suppress(ValueError):
            yield _toml_value(" ".join(self))
        if len(self) == 1:
            yield self[0]
        with contextlib.suppress(ValueError):
            yield [_toml_value(word) for word in self]
        yield list(self)


def parse(cli: Sequence[str], choices: Collection[str] = ()) -> tuple[dict[str, Any], list[Problem]]:
    """The options as nested tables whose values are Arguments, and what is wrong with how they are written.

    `choices` are the dotted keys of the sections of which `section:type` chooses the type.
    """
    given: list[tuple[str, Argument]] = []
    problems = []
    for word in cli:
        section, colon, choice = word.partition(":")
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            given.append((_key(name), Argument([value] if equals else [])))
        elif colon and _key(section) in choices:
            given.append((f"{_key(section)}.type", Argument([choice])))
        elif given:
            given[-1][1].append(word)
        else:
            problems.append(Problem(word, "options are written --section.key VALUE", source=SOURCE))
    tables: dict[str, Any] = {}
    for key, argument in given:
        table, dot, name = key.rpartition(".")
        if not argument and name.startswith("no_"):
            key, argument = f"{table}{dot}{name.removeprefix('no_')}", Argument(["false"])
        if not _insert(tables, key, argument):
            problems.append(Problem(key, "given as a whole and in part; give one of the two", source=SOURCE))
    return tables, problems


def choices(config: "Trainer.Config") -> set[str]:
    """The sections whose type is a choice of subcommands for tyro."""
    return {key for key, hint, _ in walk(config) if any(arm.name for arm in arms(hint))}


def print_help(config: Any, section: str, prog: str) -> NoReturn:
    """Prints the options of one section, or of all if `section` is empty, and exits with code 0."""
    import tyro

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
    from let_plugin.runtime import upstream

    sections = {key: value for key, _, value in walk(config) if dataclasses.is_dataclass(value)}
    section, shown = _key(section), config
    if section:
        if section not in sections:
            raise ConfigError(Problem("--help", f"no such section; {suggest(section, sections)}", section, SOURCE))
        shown = sections[section]
        for name in reversed(section.split(".")):  # in a table of its own, so that the options keep their whole names
            default = dataclasses.field(default_factory=functools.partial(copy.copy, shown))
            shown = dataclasses.make_dataclass("Options", [(name, type(shown), default)])()
    tyro.cli(type(shown), prog=prog, args=["--help"], default=shown, registry=upstream.tyro_registry())
    raise AssertionError("tyro exits after the help")


def _insert(tables: dict[str, Any], key: str, argument: Argument) -> bool:
    """False if `key` is in a table that has been given as a whole, or the other way round."""
    *parents, name = key.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            return False
    if isinstance(tables.get(name), dict):
        return False
    tables[name] = argument
    return True


def _key(option: str) -> str:
    key = option.removeprefix("--").replace("-", "_")
    return "runtime.log" if key == "log" else key


def _toml_value(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return float(text)  # .5 and 5., which TOML does not have
