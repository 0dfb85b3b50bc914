"""TOML file -> torchtitan configuration, with the command line on top (command line > TOML > base).

`base = "module.function"` names one of torchtitan's configuration functions, or one of the user's; the file's tables
overlay the fields of what it returns. `read` comes first and imports neither torch nor torchtitan.
"""

import importlib
import logging
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import tomli
import tomli_w

from let_plugin.config import RuntimeConfig, command_line
from let_plugin.config.dump import to_tables
from let_plugin.config.errors import ConfigError, Problem, raise_if_any, suggest
from let_plugin.config.overlay import Overlay
from let_plugin.config.tables import STOPS

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

T = TypeVar("T")

# Imported so that a `type` key finds their classes by a short name, and `let.teacher.spec` the demo's teacher.
_COMMON_MODULES = (
    "let_plugin.demo.config_registry",
    "let_plugin.runtime.held_out",
    "let_plugin.runtime.upstream",
    "let_plugin.tokens.tiktoken",
    "torchtitan.components.loss",
    "torchtitan.components.tokenizer",
    "torchtitan.components.validate",
    "torchtitan.distributed.activation_checkpoint",
)
# Where files lie that are not the user's; of a traceback through a configuration function the rest is shown.
_NOT_OWN = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), __file__, "<frozen")


class Source(NamedTuple):
    """A TOML file as it was read, once, and the options after it; `runtime` is what both say in `[runtime]`."""

    path: Path
    tables: Mapping[str, Any]
    cli: Sequence[str]
    runtime: RuntimeConfig


@dataclass(frozen=True)
class Loaded:
    """A configuration and where it came from."""

    config: "Trainer.Config"  # the effective one; it has the tables `let` and `runtime`
    base: str  # "module.function" of the configuration function underneath
    source: str  # path of the TOML file
    tables: Mapping[str, Any]  # what the file says on top of `base`
    options: Mapping[str, Any]  # what the command line says on top of that
    problems: Sequence[Problem]  # the mistakes in both; `config` goes without these values

    def apply(self, function: "Callable[[Trainer.Config], T]") -> T:
        """`function(config)`.

        ConfigError with all that is wrong: `problems`, and what the function finds, to which this adds the source.
        """
        try:
            result = function(self.config)
        except ConfigError as error:
            wrong = {problem.key for problem in self.problems}  # its value was left out: what then is there is no news
            found = [
                replace(problem, source=problem.source or self.origin(problem.key))
                for problem in error.problems
                if problem.key not in wrong
            ]
            raise ConfigError([*self.problems, *found]) from error
        raise_if_any(self.problems)
        return result

    def origin(self, key: str) -> str:
        """Who gave the value of `key`, or of a table around it: the command line, else the file, else the base."""
        if _is_given(key, self.options):
            return command_line.SOURCE
        return self.source if key.partition(".")[0] in self.tables else f"base {self.base}"


def read(argv: Sequence[str]) -> Source:
    """Reads the TOML file, which is the first argument. ConfigError if it cannot be read."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError(Problem(command_line.SOURCE, "the first argument is the TOML file", argv[0] if argv else ""))
    path, cli = Path(argv[0]), argv[1:]
    tables = read_toml(path)
    runtime = RuntimeConfig()
    for given in (tables, command_line.parse(cli)[0]):
        runtime = Overlay("").value("runtime", given.get("runtime", {}), RuntimeConfig, runtime)
    return Source(path, tables, cli, runtime)


def load(path: Path, cli: Sequence[str]) -> Loaded:
    """The configuration of a TOML file with the options `cli` on top. ConfigError with the mistakes in both."""
    loaded = resolve(read([str(path), *cli]))
    raise_if_any(loaded.problems)
    return loaded


def resolve(source: Source) -> Loaded:
    """As `load`, but the mistakes are in the result, next to a configuration of what is right.

    ConfigError if `base` cannot be loaded. `--help` exits with code 0.
    """
    file, cli = str(source.path), list(source.cli)
    tables, overlay = _with_let_shorthands(source.tables), Overlay(file)
    base = tables.pop("base", "")
    try:
        config = load_base(base)
    except ConfigError as error:
        raise ConfigError(replace(problem, source=file) for problem in error.problems) from error
    config = overlay.configuration(_without_stops(config, tables), tables)
    if "--help" in cli:
        section = [word for word in cli[cli.index("--help") + 1 :][:1] if not word.startswith("--")]
        command_line.print_help(config, "".join(section), f"let-train {file}")
    options, problems = command_line.parse(cli, command_line.choices(config))
    on_top = Overlay(command_line.SOURCE)
    config = on_top.configuration(_without_stops(config, options), options)
    key, settings = "checkpoint.initial_load_model_only", config.checkpoint
    if _is_given(key, options) and not getattr(settings, "initial_load_path", True):  # --print-config has all keys
        logging.getLogger().warning(f"LET: {key} has no effect without its initial_load_path")
    return Loaded(config, base, file, tables, options, [*overlay.problems, *problems, *on_top.problems])


def dump(loaded: Loaded) -> str:
    """The effective configuration as TOML, complete: `load` of the text gives an equal configuration.

    ConfigError if a value that differs from the base's cannot be written as TOML.
    """
    base = load_base(loaded.base)
    return tomli_w.dumps({"base": loaded.base, **to_tables(loaded.config, base)})


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file. ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return tomli.load(file)
    except OSError as error:
        raise ConfigError(Problem(str(path), f"cannot be read: {str(error.strerror).lower()}")) from error
    except ValueError as error:  # also where it is not UTF-8
        raise ConfigError(Problem(str(path), f"not valid TOML: {error}")) from error


def _is_given(key: str, tables: Any) -> bool:
    """Whether the tables have the key, one around it, one in it, or the type of a table around it."""
    for name in key.split("."):
        if not isinstance(tables, dict) or "type" in tables:
            return True
        if name not in tables:
            return False
        tables = tables[name]
    return True


def _with_let_shorthands(tables: Mapping[str, Any]) -> dict[str, Any]:
    let: Any = tables.get("let")
    if not isinstance(let, dict):
        return dict(tables)
    let = {"enable": True, **let}
    if isinstance(let.get("teacher"), str):
        let["teacher"] = {"path": let["teacher"]}
    return {**tables, "let": let}


def _without_stops(config: "Trainer.Config", tables: Mapping[str, Any]) -> "Trainer.Config":
    """Of the `stop_*` keys at most one is given: one in `tables` replaces those of the layers below."""
    let = tables.get("let")
    if not isinstance(let, dict) or not let.keys() & set(STOPS):
        return config
    return replace(config, let=replace(config.let, **dict.fromkeys(STOPS)))


def load_base(base: Any) -> "Trainer.Config":
    """The LET configuration on top of what the function `base` returns; ConfigError if it returns none."""
    if not isinstance(base, str) or "." not in base:
        raise ConfigError(Problem("base", 'expected "module.function", as in base = "llama3.llama3_debugmodel"', base))

    from torchtitan.trainer import Trainer

    from let_plugin.trainer import with_let

    for common in _COMMON_MODULES:
        importlib.import_module(common)
    # torchrun -m has the working directory on the path, a console script has not.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        config = _function(base)()
    except ConfigError:
        raise
    except Exception as error:  # a user's module or function may raise anything
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_OWN)]
        where = "".join(traceback.format_list(own)).rstrip()
        raise ConfigError(Problem("base", f"failed: {type(error).__name__}: {error}\n{where}", base)) from error
    if not isinstance(config, Trainer.Config):
        message = f"returns a {type(config).__qualname__}, not the configuration of a torchtitan Trainer"
        raise ConfigError(Problem("base", message, base))
    return config if hasattr(config, "let") else with_let(config)


def _function(base: str) -> Callable[[], Any]:
    """The configuration function; ConfigError if there is none. Raises what the import of its module raises."""
    from let_plugin.runtime.upstream import PACKAGES, SHORT_MODULES

    module_name, _, name = base.rpartition(".")
    candidates = [f"{module_name}.config_registry", module_name]
    if module_name in SHORT_MODULES:
        candidates = [f"{package}.{module_name}.config_registry" for package in PACKAGES]
    for candidate in candidates:
        try:
            module = importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            if not f"{candidate}.".startswith(f"{error.name}."):
                raise  # the module is there and imports one that is not
            continue
        if callable(function := getattr(module, name, None)):
            return function
        functions = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == candidate]
        raise ConfigError(Problem("base", f"no function {name!r} in {candidate}; {suggest(name, functions)}", base))
    message = f"no module {module_name!r} on PYTHONPATH or in the working directory, {os.getcwd()}; "
    raise ConfigError(Problem("base", f"{message}{suggest(module_name, SHORT_MODULES)}", base))
