"""The command line's options on top of a configuration: tyro takes them, and its complaints become Problems."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tomli

from let_plugin.config.errors import Problem
from let_plugin.config.overlay import Overlay

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

SOURCE = "command line"

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RULE = re.compile(r"[-─]{5,}")


def apply(config: "Trainer.Config", cli: Sequence[str], prog: str) -> tuple["Trainer.Config", list[Problem]]:
    """`config` with the options that can be taken on top, and what is wrong with the others.

    SystemExit with code 0 after `--help`; `prog` is what the help calls the program.
    """
    if not cli:
        return config, []
    config, cli, problems = _apply_tables(config, cli)
    with contextlib.suppress(ValueError, AssertionError):
        return _parse(config, cli, prog), problems
    # tyro stops at the first mistake: option by option, then, and again, as one may need another that comes later.
    options = _options(cli)
    result, taken, messages, num_taken = config, set[int](), dict[int, str](), -1
    with contextlib.redirect_stderr(io.StringIO()):  # what torchtitan logs meanwhile, over and over
        while len(taken) > num_taken:
            num_taken = len(taken)
            for i in sorted(set(range(len(options))) - taken):
                try:
                    result = _parse(config, [arg for j in sorted({*taken, i}) for arg in options[j]], prog)
                    taken.add(i)
                except (ValueError, AssertionError) as error:
                    messages[i] = str(error)
    problems += [_problem(result, option, messages[i]) for i, option in enumerate(options) if i not in taken]
    return result, problems


def _apply_tables(config: "Trainer.Config", cli: Sequence[str]) -> tuple["Trainer.Config", list[str], list[Problem]]:
    """Takes the options that tyro has no flags for: keys of a free table, and arrays of tables, written as in TOML.

    Returns the configuration with them, the other options, and what is wrong.
    """
    overlay, rest = Overlay(SOURCE), list[str]()
    for option in _options(cli):
        # What follows the value is no part of it: a choice (activation-checkpoint:full), say.
        num_own = 1 if "=" in option[0] else 2
        key, value = _key(option[0]), _text(option[:num_own])
        if option[0].startswith("--") and value and _is_table(config, key.split("."), value):
            config = overlay.configuration(config, _nested(key, _toml_value(value)))
            option = option[num_own:]
        rest += option
    return config, rest, overlay.problems


def _is_table(config: Any, names: list[str], value: str) -> bool:
    for i, name in enumerate(names):
        if isinstance(config, dict):
            return i == len(names) - 1
        if not hasattr(config, name):
            return False
        config = getattr(config, name)
    return isinstance(config, list) and value.startswith("[")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def keys(cli: Sequence[str]) -> set[str]:
    """The dotted keys that the options set, as TOML spells them."""
    found = set()
    for arg in cli:
        if arg.startswith("--"):
            table, dot, name = _key(arg).rpartition(".")
            found |= {f"{table}{dot}{name}", f"{table}{dot}{name.removeprefix('no_')}"}  # --let.no-enable
        elif ":" in arg:  # activation-checkpoint:full
            found.add(arg.partition(":")[0].replace("-", "_"))
    return found


def _parse(config: "Trainer.Config", args: Sequence[str], prog: str) -> "Trainer.Config":
    """ValueError with tyro's message, or AssertionError of a __post_init__, if tyro does not take `args`."""
    import tyro

    from let_plugin.runtime import upstream

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            result = tyro.cli(
                type(config),
                prog=prog,
                args=args,
                default=config,
                registry=upstream.tyro_registry(),
                # Else an option that follows a choice (activation-checkpoint:full) would count as the choice's own.
                config=(tyro.conf.CascadeSubcommandArgs,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_first_paragraph(printed.getvalue())) from None
    print(printed.getvalue(), end="", file=sys.stderr)
    return result


def _first_paragraph(box: str) -> str:
    """The message in a box of tyro's, without what tyro says about its help: text between the first two rules."""
    lines: list[str] = []
    for line in _ANSI.sub("", box).splitlines():
        if line[:1] in ("│", "|"):
            text = line.strip("│| ")
            if _RULE.fullmatch(text):
                break
            lines.append(text)
    return " ".join(lines)


def _options(cli: Sequence[str]) -> list[list[str]]:
    """Each option together with its values."""
    options: list[list[str]] = []
    for arg in cli:
        if arg.startswith("--") or not options:
            options.append([])
        options[-1].append(arg)
    return options


def _problem(config: "Trainer.Config", option: list[str], message: str) -> Problem:
    """What is wrong with an option that tyro refused: in the words for TOML if it would be wrong there, too."""
    key = _key(option[0])
    if not option[0].startswith("--"):
        return Problem(option[0], f"{message}; options are written --section.key VALUE", source=SOURCE)
    text = _text(option)
    value = _toml_value(text)
    overlay = Overlay(SOURCE)
    overlay.configuration(config, _nested(key, value))
    message = overlay.problems[0].message if overlay.problems else message
    return Problem(key, message, source=SOURCE, **({"value": value} if text or "=" in option[0] else {}))


def _text(option: list[str]) -> str:
    """The value of an option, as it is written."""
    return option[0].partition("=")[2] if "=" in option[0] else " ".join(option[1:])


def _key(option: str) -> str:
    return option.partition("=")[0].removeprefix("--").replace("-", "_")


def _toml_value(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text
