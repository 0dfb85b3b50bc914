"""TOML file -> torchtitan configuration, with the command line on top (command line > TOML > base).

`base = "module.function"` names one of torchtitan's configuration functions, or one of the user's; the file's tables
overlay the fields of what it returns. `read_runtime` comes first and imports neither torch nor torchtitan.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tomli
import tomli_w

from let_plugin.config import LetConfig, RuntimeConfig, command_line, legacy_keys
from let_plugin.config.dump import to_tables
from let_plugin.config.errors import ConfigError, Problem, mentions, suggest
from let_plugin.config.overlay import Overlay, leaves

if TYPE_CHECKING:
    from types import ModuleType

    from torchtitan.trainer import Trainer

T = TypeVar("T")

_BASE_FORMAT = 'expected "module.function", as in base = "llama3.llama3_debugmodel"'

# Imported so that a `type` key finds their classes by a short name.
_COMMON_MODULES = (
    "let_plugin.runtime.held_out",
    "let_plugin.tokens.tiktoken",
    "torchtitan.components.checkpointer",
    "torchtitan.components.dataloader",
    "torchtitan.components.loss",
    "torchtitan.components.optimizer",
    "torchtitan.components.tokenizer",
    "torchtitan.components.validate",
    "torchtitan.distributed.activation_checkpoint",
    "torchtitan.hf_datasets.text_datasets",
)


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
            found = [p for p in error.problems if not any(self._follows(p, earlier) for earlier in self.problems)]
            found = [replace(p, source=p.source or self.origin(p.key)) for p in found]
            raise ConfigError([*self.problems, *found]) from error
        if self.problems:
            raise ConfigError(self.problems)
        return result

    def origin(self, key: str) -> str:
        """Who gave the value of `key`, or of a table around it: the command line, else the file, else the base."""
        if any(_is_in(key, option) or _is_in(option, key) for option in self.options):
            return command_line.SOURCE
        return self.source if key.partition(".")[0] in self.tables else f"base {self.base}"

    def _gives(self, key: str) -> bool:
        """Whether the file or the command line has `key` itself."""
        content: Any = self.tables
        for name in key.split("."):
            if not isinstance(content, dict) or name not in content:
                return key in self.options
            content = content[name]
        return True

    def _follows(self, problem: Problem, earlier: Problem) -> bool:
        """Whether a problem that a function has found is a mere consequence of an earlier one."""
        # What stands in for a wrong value may be wrong, too, or not fit another value. A value that nobody gave may be
        # in a table that is wrong, or what a wrong key was meant for. All else is the user's own: a mistake, too.
        if earlier.key == problem.key or mentions(problem.message, earlier.key.removeprefix(f"{problem.key}.")):
            return True
        if self._gives(problem.key):
            return False
        parent = earlier.key.rpartition(".")[0]
        name = problem.key.removeprefix(f"{parent}.").partition(".")[0] if _is_in(problem.key, parent) else problem.key
        remedy = earlier.message.partition("valid names")[0]
        return _is_in(problem.key, earlier.key) or mentions(remedy, name) or mentions(remedy, problem.key)


def read_runtime(argv: list[str]) -> tuple[Path, RuntimeConfig]:
    """The TOML file, which is the first argument, and its `[runtime]` table with `--runtime.device` on top.

    A wrong one goes without: `resolve` says what is wrong. ConfigError if the file cannot be read.
    """
    if not argv or argv[0].startswith("-"):
        raise ConfigError(Problem(command_line.SOURCE, "the first argument is the TOML file", argv[0] if argv else ""))
    path = Path(argv[0])
    runtime = _runtime_overlay(RuntimeConfig(), _read(path).get("runtime", {}))
    for i, arg in enumerate(argv):
        option, equals, value = arg.partition("=")
        if option == "--runtime.device":
            value = value if equals else "".join(argv[i + 1 : i + 2])
            runtime = _runtime_overlay(runtime, {"device": value})
    return path, runtime


def load(path: Path, cli: list[str]) -> Loaded:
    """The configuration of a TOML file with the options `cli` on top.

    Raises:
        ConfigError: With every mistake that can be told without a look at what the values stand for.
        SystemExit: Code 0 after `--help`.
    """
    loaded = resolve(path, cli)
    if loaded.problems:
        raise ConfigError(loaded.problems)
    return loaded


def resolve(path: Path, cli: list[str]) -> Loaded:
    """As `load`, but the mistakes are in the result, next to a configuration of what is right.

    Raises:
        ConfigError: If the file or its `base` cannot be loaded; with all that can be told without the base.
        SystemExit: Code 0 after `--help`.
    """
    source = str(path)
    tables = _with_let_shorthands(_read(path))
    base = tables.pop("base", None)
    try:
        config = _load_base(base, source)
    except ConfigError as error:
        raise ConfigError([*error.problems, *_problems_without_base(tables, source)]) from error
    overlay = Overlay(source)
    config = overlay.configuration(config, tables)
    config, problems = command_line.apply(config, cli, f"let-train {source}")
    return Loaded(config, base, source, tables, command_line.keys(cli), [*overlay.problems, *problems])


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


def _runtime_overlay(runtime: RuntimeConfig, table: Any) -> RuntimeConfig:
    return Overlay("").value("runtime", table, RuntimeConfig, runtime)


def _is_in(key: str, table: str) -> bool:
    return not table or f"{key}.".startswith(f"{table}.")


def _with_let_shorthands(tables: dict[str, Any]) -> dict[str, Any]:
    let: Any = tables.get("let")
    if not isinstance(let, dict):
        return tables
    let = {"enable": True, **let}
    if isinstance(let.get("teacher"), str):
        let["teacher"] = {"path": let["teacher"]}
    return tables | {"let": let}


def _problems_without_base(tables: dict[str, Any], source: str) -> list[Problem]:
    """What can be told without a base: LET's own tables, and old keys, for the file may be one of torchtitan's own."""
    overlay = Overlay(source)
    for name, cls in (("let", LetConfig), ("runtime", RuntimeConfig)):
        if name in tables:
            overlay.value(name, tables[name], cls, cls())
    leaves_with_messages = ((key, value, legacy_keys.explain(key)) for key, value in leaves("", tables))
    old_keys = [Problem(key, message, value, source) for key, value, message in leaves_with_messages if message]
    return overlay.problems + old_keys


def _load_base(base: Any, source: str) -> "Trainer.Config":
    """The LET configuration on top of what the function `base` returns; ConfigError if there is no such function."""
    if base is None:
        raise ConfigError(Problem("base", f"missing; {_BASE_FORMAT}", source=source))

    from torchtitan.trainer import Trainer

    from let_plugin.runtime import upstream
    from let_plugin.trainer import with_let

    for name in _COMMON_MODULES:
        importlib.import_module(name)
    # torchrun -m has the working directory on the path, a console script has not.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())

    module, _, function = base.rpartition(".") if isinstance(base, str) else ("", "", "")
    if not module or not function:
        raise ConfigError(Problem("base", _BASE_FORMAT, base, source))
    try:
        config = upstream.load_base(module, function)
        if isinstance(config, Trainer.Config):
            return config if hasattr(config, "let") else with_let(config)
        message = f"returns a {type(config).__qualname__}, not the configuration of a torchtitan Trainer"
    except (ImportError, ValueError, AssertionError, OSError) as error:
        message = _diagnose(module, function) or f"{function}() failed: {type(error).__name__}: {error}"
    except TypeError:  # a helper instead of a configuration function, or a bug in one: that keeps its traceback
        message = _diagnose(module, function) or ""
        if not message:
            raise
    raise ConfigError(Problem("base", message, base, source))


def _diagnose(module_name: str, function: str) -> str | None:
    """Why torchtitan does not find a configuration function; None if it is there.

    torchtitan takes every ImportError for a missing module, those from inside a user's module too.
    """
    from let_plugin.runtime.upstream import SHORT_MODULES

    if module_name in SHORT_MODULES:
        packages = ("torchtitan.models", "torchtitan.experiments", "torchtitan.experiments.rl.examples")
        candidates = [f"{package}.{module_name}.config_registry" for package in packages]
    else:
        candidates = [f"{module_name}.config_registry", module_name]
    module: ModuleType | None = None
    for candidate in candidates:
        try:
            module = module or importlib.import_module(candidate)
        except ImportError as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{candidate}.".startswith(f"{missing}."):
                return f"importing {candidate} failed: {error}"
    if module is None:
        return f"no module {module_name!r} (nor {candidates[0]!r}); {suggest(module_name, SHORT_MODULES)}"
    functions = _config_functions(module)
    value = getattr(module, function, None)
    if not callable(value):
        return f"no function {function!r} in {module.__name__}; {suggest(function, functions)}"
    if _has_required_parameters(value):
        return f"a configuration function takes no arguments; {suggest(function, functions)}"
    return None


def _config_functions(module: "ModuleType") -> list[str]:
    """The public functions that a module defines and that can be called without arguments."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not _has_required_parameters(value)
    ]


def _has_required_parameters(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False
