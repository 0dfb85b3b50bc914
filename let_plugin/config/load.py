"""TOML file -> torchtitan configuration, with the command line on top (command line > TOML > base).

`base = "module.function"` names one of torchtitan's configuration functions, or one of the user's; the file's tables
overlay the fields of what it returns. `read` comes first and imports neither torch nor torchtitan.
"""

import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tomli
import tomli_w

from let_plugin.config import LetConfig, RuntimeConfig, command_line, legacy_keys
from let_plugin.config.dump import to_tables
from let_plugin.config.errors import ConfigError, Problem, suggest
from let_plugin.config.overlay import Overlay, leaves

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

T = TypeVar("T")

_BASE_FORMAT = 'expected "module.function", as in base = "llama3.llama3_debugmodel"'

# Imported so that a `type` key finds their classes by a short name.
_COMMON_MODULES = (
    "let_plugin.runtime.held_out",
    "let_plugin.runtime.upstream",
    "let_plugin.tokens.tiktoken",
    "torchtitan.components.loss",
    "torchtitan.components.tokenizer",
    "torchtitan.components.validate",
    "torchtitan.distributed.activation_checkpoint",
)

# Code that a user did not write: this package, installed packages, Python itself.
_NOT_THE_USERS = (
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    "<frozen",
)


@dataclass(frozen=True)
class Source:
    """A TOML file as it was read, once, and the options of the command line after it.

    Attributes:
        path: The file.
        tables: Its content.
        cli: The options.
        runtime: The `[runtime]` table with the options on top; what is wrong in it has its default.
    """

    path: Path
    tables: Mapping[str, Any]
    cli: Sequence[str]
    runtime: RuntimeConfig


@dataclass(frozen=True)
class Loaded:
    """A configuration and where it came from.

    Attributes:
        config: The effective configuration; it has the tables `let` and `runtime`.
        base: "module.function" of the configuration function underneath.
        source: Path of the TOML file.
        tables: What the file says on top of `base`.
        options: Dotted keys of what the command line says on top of that.
        problems: The mistakes in both; `config` goes without these values.
    """

    config: "Trainer.Config"
    base: str
    source: str
    tables: dict[str, Any] = field(default_factory=dict)
    options: Set[str] = frozenset()
    problems: Sequence[Problem] = ()

    def apply(self, function: "Callable[[Trainer.Config], T]") -> T:
        """`function(config)`.

        ConfigError with all that is wrong: `problems`, and what the function finds, to which this adds the source.
        """
        try:
            result = function(self.config)
        except ConfigError as error:
            found = [problem for problem in error.problems if not self._may_follow(problem)]
            found = [replace(problem, source=problem.source or self.origin(problem.key)) for problem in found]
            raise ConfigError([*self.problems, *found]) from error
        if self.problems:
            raise ConfigError(self.problems)
        return result

    def origin(self, key: str) -> str:
        """Who gave the value of `key`, or of a table around it: the command line, else the file, else the base."""
        if any(_overlap(key, option) for option in self.options):
            return command_line.SOURCE
        return self.source if _section(key) in self.tables else f"base {self.base}"

    def _may_follow(self, found: Problem) -> bool:
        """Whether a problem may be there only because a wrong value was left out.

        So is one whose message quotes such a key. Else a key that the user gave is judged by its own value. The others
        may be what a wrong key in their section, or one in a section that there is not, was meant for.
        """
        wrong = {problem.key for problem in self.problems}
        if any(f"{key} = " in found.message for key in wrong):
            return True
        given = {*leaves("", self.tables), *self.options} - wrong
        if any(_overlap(found.key, key) for key in given):
            return False
        return any(_section(key) == _section(found.key) or not hasattr(self.config, _section(key)) for key in wrong)


def read(argv: Sequence[str]) -> Source:
    """Reads the TOML file, which is the first argument. ConfigError if it cannot be read."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError(Problem(command_line.SOURCE, "the first argument is the TOML file", argv[0] if argv else ""))
    path, cli = Path(argv[0]), argv[1:]
    tables = _read(path)
    runtime = RuntimeConfig()
    for given in (tables, command_line.parse(cli)[0]):
        runtime = Overlay("").value("runtime", given.get("runtime", {}), RuntimeConfig, runtime)
    return Source(path, tables, cli, runtime)


def load(path: Path, cli: Sequence[str]) -> Loaded:
    """The configuration of a TOML file with the options `cli` on top.

    Raises:
        ConfigError: With every mistake that can be told without a look at what the values stand for.
        SystemExit: Code 0 after `--help`.
    """
    loaded = resolve(read([str(path), *cli]))
    if loaded.problems:
        raise ConfigError(loaded.problems)
    return loaded


def resolve(source: Source) -> Loaded:
    """As `load`, but the mistakes are in the result, next to a configuration of what is right.

    Raises:
        ConfigError: If `base` cannot be loaded; with all that can be told without it.
        SystemExit: Code 0 after `--help`.
    """
    file, cli = str(source.path), list(source.cli)
    tables = _with_let_shorthands(source.tables)
    base = tables.pop("base", None)
    try:
        config = _load_base(base, file)
    except ConfigError as error:
        raise ConfigError([*error.problems, *_problems_without_base(tables, file)]) from error
    overlay = Overlay(file)
    config = overlay.configuration(config, tables)
    if "--help" in cli:
        section = [word for word in cli[cli.index("--help") + 1 :] if not word.startswith("--")][:1]
        command_line.print_help(config, "".join(section), f"let-train {file}")
    options, problems = command_line.parse(cli, command_line.choices(config))
    on_top = Overlay(command_line.SOURCE)
    config = on_top.configuration(config, options)
    keys = {key.removesuffix(".type") for key in leaves("", options)} if options else set()
    return Loaded(config, base, file, tables, keys, [*overlay.problems, *problems, *on_top.problems])


def dump(loaded: Loaded) -> str:
    """The effective configuration as TOML, complete: `load` of the text gives an equal configuration.

    ConfigError if a value that differs from the base's cannot be written as TOML.
    """
    base = _load_base(loaded.base, loaded.source)
    return tomli_w.dumps({"base": loaded.base, **to_tables(loaded.config, base)})


def _read(path: Path) -> dict[str, Any]:
    source = str(path)
    try:
        with path.open("rb") as file:
            return tomli.load(file)
    except FileNotFoundError:
        problem = Problem(source, "no such file")
    except IsADirectoryError:
        problem = Problem(source, "a folder; expected a TOML file")
    except OSError as error:
        problem = Problem(source, f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        problem = Problem(source, f"not a text file in UTF-8: {error.reason} at byte {error.start}")
    except tomli.TOMLDecodeError as error:
        problem = Problem(source, f"not valid TOML: {error}")
    raise ConfigError(problem)


def _section(key: str) -> str:
    return key.partition(".")[0]


def _overlap(key: str, other: str) -> bool:
    """Whether one of two keys is the other or in the table of that name."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _with_let_shorthands(tables: Mapping[str, Any]) -> dict[str, Any]:
    let: Any = tables.get("let")
    if not isinstance(let, dict):
        return dict(tables)
    let = {"enable": True, **let}
    if isinstance(let.get("teacher"), str):
        let["teacher"] = {"path": let["teacher"]}
    return {**tables, "let": let}


def _problems_without_base(tables: dict[str, Any], source: str) -> list[Problem]:
    """What is wrong in LET's own tables, and old keys, for the file may be one of torchtitan's own."""
    overlay = Overlay(source)
    for name, cls in (("let", LetConfig), ("runtime", RuntimeConfig)):
        overlay.value(name, tables.get(name, {}), cls, cls())
    old = ((key, legacy_keys.explain(key)) for key in [*tables, *leaves("", tables)])
    return overlay.problems + [Problem(key, message, source=source) for key, message in dict(old).items() if message]


def _load_base(base: Any, source: str) -> "Trainer.Config":
    """The LET configuration on top of what the function `base` returns; ConfigError if it returns none."""
    module, _, name = base.rpartition(".") if isinstance(base, str) else ("", "", "")
    if base is None:
        raise ConfigError(Problem("base", f"missing; {_BASE_FORMAT}", source=source))
    if not module or not name:
        raise ConfigError(Problem("base", _BASE_FORMAT, base, source))

    from torchtitan.trainer import Trainer

    from let_plugin.trainer import with_let

    for common in _COMMON_MODULES:
        importlib.import_module(common)
    # torchrun -m has the working directory on the path, a console script has not.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = _find(module, name)
        config = function() if callable(function) else None
    except Exception as error:  # a user's module or function may raise anything
        message = f"{base} failed: {type(error).__name__}: {error}{_users_frames(error)}"
        raise ConfigError(Problem("base", message, base, source)) from error
    if isinstance(function, str):
        raise ConfigError(Problem("base", function, base, source))
    if not isinstance(config, Trainer.Config):
        message = f"returns a {type(config).__qualname__}, not the configuration of a torchtitan Trainer"
        raise ConfigError(Problem("base", message, base, source))
    return config if hasattr(config, "let") else with_let(config)


def _find(module_name: str, name: str) -> "Callable[[], Trainer.Config] | str":
    """The configuration function; what is wrong if there is none. Raises what the import of a module raises."""
    from let_plugin.runtime.upstream import PACKAGES, SHORT_MODULES

    candidates = [f"{module_name}.config_registry", module_name]
    if module_name in SHORT_MODULES:
        candidates = [f"{package}.{module_name}.config_registry" for package in PACKAGES]
    for candidate in candidates:
        try:
            module = importlib.import_module(candidate)
            break
        except ModuleNotFoundError as error:
            if not f"{candidate}.".startswith(f"{error.name}."):
                raise  # the module is there and imports one that is not
    else:
        return f"no module {module_name!r} (nor {candidates[0]!r}); {suggest(module_name, SHORT_MODULES)}"
    functions = {
        key: value
        for key, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == candidate and not key.startswith("_") and not _has_required_parameters(value)
    }
    value = getattr(module, name, None)
    if not callable(value):
        return f"no function {name!r} in {candidate}; {suggest(name, functions)}"
    if _has_required_parameters(value):
        return f"a configuration function takes no arguments; {suggest(name, functions)}"
    return value


def _has_required_parameters(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False


def _users_frames(error: Exception) -> str:
    """The lines of the traceback that are in the user's own files."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return "".join(f"\n    {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in frames)
