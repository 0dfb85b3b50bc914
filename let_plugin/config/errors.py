"""One clear error for bad input: every mistake at once, each with its field, its value and the remedy."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from let_plugin.alignment.registry import suggest as suggest

T = TypeVar("T")

_ABSENT = object()
_SECONDS_FOR_RANK_0 = 10.0


@dataclass(frozen=True)
class Problem:
    """One mistake of the user's."""

    key: str  # dotted name of the field, as in TOML and on the command line: "training.steps"
    message: str  # what is wrong, and what to do about it
    value: Any = _ABSENT  # left out when there is none (a missing key, say)
    source: str = ""  # the file or "command line" that the value came from, if known

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        value = "" if self.value is _ABSENT else f" = {self.value!r}"
        return f"{where}{self.key}{value}: {self.message}"


class ConfigError(ValueError):
    """Bad input. Raised once, before anything is trained or written, with all the problems found."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        assert self.problems, "a ConfigError without a problem"
        super().__init__("\n".join(map(str, self.problems)))


def raise_if_any(problems: Iterable[Problem]) -> None:
    """ConfigError with all of these problems, if there are any."""
    if found := list(problems):
        raise ConfigError(found)


def exit_with(error: ConfigError, program: str = "let-train") -> NoReturn:
    """Prints a heading and a line for each problem, and exits with code 2."""
    if os.environ.get("RANK", "0") != "0":
        # torchrun ends all ranks as soon as one has failed. Let rank 0 report first: it usually has the same problem.
        # A problem of this rank alone (a file that its machine lacks) is still printed after the wait.
        time.sleep(_SECONDS_FOR_RANK_0)
    count = len(error.problems)
    heading = f"{program}: {count} problem{'s' if count > 1 else ''} in the configuration"
    print("\n".join([heading, *(f"  {problem}" for problem in error.problems)]), file=sys.stderr, flush=True)
    raise SystemExit(2)


def lookup(get: Callable[[str], T], name: str, *, key: str) -> T:
    """`get(name)` of a registry; ConfigError that names the field `key` if there is no such entry."""
    try:
        return get(name)
    except LookupError as error:
        raise ConfigError(Problem(key, str(error), name)) from error
