"""TOML file -> torchtitan configuration, with the command line on top (command line > TOML > base).

`base = "module.function"` names one of torchtitan's configuration functions, or one of the user's; the file's tables
overlay the fields of what it returns. `read_runtime` comes first and imports neither torch nor torchtitan.
"""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli
import tomli_w

from let_plugin import legacy_keys
from let_plugin.config import RuntimeConfig
from let_plugin.errors import ConfigError, Problem, suggest
from let_plugin.toml_dump import to_tables
from let_plugin.toml_overlay import Overlay

if TYPE_CHECKING:
    from types import ModuleType

    from torchtitan.config import ConfigManager
    from torchtitan.trainer import Trainer

_COMMAND_LINE = "command line"
_BASE_FORMAT = 'expected "module.function", as in base = "llama3.llama3_debugmodel"'

# Imported so that a `type` key finds their classes by a short name.
_COMMON_MODULES = (
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
    """

    config: "Trainer.Config"
    base: str
    source: str


def read_runtime(argv: list[str]) -> tuple[Path, RuntimeConfig]:
    """The TOML file, which is the first argument, and its `[runtime]` table with `--runtime.device` on top.

    ConfigError if the file cannot be read or one of the two is wrong.
    """
    if not argv or argv[0].startswith("-"):
        raise ConfigError(Problem(_COMMAND_LINE, "the first argument is the TOML file", argv[0] if argv else ""))
    path = Path(argv[0])
    table = _read(path).get("runtime", {})
    runtime = _runtime_overlay(RuntimeConfig(), table, str(path))
    for i, arg in enumerate(argv):
        option, equals, value = arg.partition("=")
        if option == "--runtime.device":
            value = value if equals else "".join(argv[i + 1 : i + 2])
            runtime = _runtime_overlay(runtime, {"device": value}, _COMMAND_LINE)
    return path, runtime


def load(path: Path, cli: list[str]) -> Loaded:
    """The configuration of a TOML file with the options `cli` on top.

    Raises:
        ConfigError: With every mistake in the file.
        SystemExit: Code 2 after tyro's message about a mistake in `cli`; code 0 after `--help`.
    """
    tables = _read(path)
    source = str(path)
    base = tables.pop("base", None)
    if base is None:
        raise ConfigError([Problem("base", f"missing; {_BASE_FORMAT}", source=source), *_old_keys(tables, source)])
    config = _load_base(base, source)

    overlay = Overlay(source)
    config = overlay.configuration(config, _with_let_shorthands(tables))
    if overlay.problems:
        raise ConfigError(overlay.problems)
    return Loaded(_with_command_line(config, cli, source), base, source)


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


def _runtime_overlay(runtime: RuntimeConfig, table: Any, source: str) -> RuntimeConfig:
    overlay = Overlay(source)
    result = overlay.value("runtime", table, RuntimeConfig, runtime)
    if overlay.problems:
        raise ConfigError(overlay.problems)
    return result


def _with_let_shorthands(tables: dict[str, Any]) -> dict[str, Any]:
    let: Any = tables.get("let")
    if not isinstance(let, dict):
        return tables
    let = {"enable": True, **let}
    if isinstance(let.get("teacher"), str):
        let["teacher"] = {"path": let["teacher"]}
    return tables | {"let": let}


def _old_keys(tables: dict[str, Any], source: str) -> list[Problem]:
    """A file without `base` is most likely one of torchtitan's own: say at once what else has changed."""
    problems = []
    for table, content in tables.items():
        for key in content if isinstance(content, dict) else ():
            message = legacy_keys.explain(f"{table}.{key}")
            if message is not None:
                problems.append(Problem(f"{table}.{key}", message, source=source))
    return problems


def _with_command_line(config: "Trainer.Config", cli: list[str], source: str) -> "Trainer.Config":
    if not cli:
        return config
    import tyro
    from torchtitan.config.manager import custom_registry

    _manager()
    try:
        return tyro.cli(
            type(config),
            prog=f"let-train {source}",
            args=cli,
            default=config,
            registry=custom_registry,
            # Else an option that follows a choice (activation-checkpoint:full) would count as the choice's own.
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except AssertionError as error:  # of a __post_init__; tyro reports ValueErrors itself
        raise ConfigError(Problem(_COMMAND_LINE, str(error))) from error


@functools.cache
def _manager() -> "ConfigManager":
    from torchtitan.config import ConfigManager

    return ConfigManager()  # registers torchtitan's rules for tyro


def _load_base(base: Any, source: str) -> "Trainer.Config":
    """The LET configuration on top of what the function `base` returns; ConfigError if there is no such function."""
    from torchtitan.trainer import Trainer

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
        config, _ = _manager()._load_config(["--module", module, "--config", function])
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
    from torchtitan.experiments import _supported_experiments
    from torchtitan.models import _supported_models

    supported = _supported_models | _supported_experiments
    if module_name in supported:
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
        return f"no module {module_name!r} (nor {candidates[0]!r}); {suggest(module_name, supported)}"
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
