"""Options of what a name selects: a TOML table becomes the keyword-only arguments of a function or class, checked."""

import copy
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.config.overlay import Overlay


def bind(function: Callable[..., Any], options: dict[str, Any], *, key: str) -> Callable[..., Any]:
    """`function`, or a class, with `options` for its keyword-only arguments.

    ConfigError for each option that `function` does not have or whose value has the wrong type; later, when the result
    is called, for one that `function` refuses with a ValueError. `key` is the table that the options come from.
    """
    code = inspect.getattr_static(function, "__init__") if isinstance(function, type) else function
    hints = typing.get_type_hints(code)
    fields = [
        (name, hints.get(name, Any), dataclasses.field(default_factory=functools.partial(copy.copy, parameter.default)))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    ]
    defaults, overlay = dataclasses.make_dataclass("Options", fields)(), Overlay("")
    table = overlay.value(key, options, type(defaults), defaults)
    raise_if_any(overlay.problems)
    values = {name: getattr(table, name) for name in options}

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Any:
        with refusals(values, key=key):
            return function(*args, **kwargs, **values)

    return bound


@contextmanager
def refusals(options: dict[str, Any], *, key: str) -> Iterator[None]:
    """Turns a ValueError whose message begins with the name of one of the `options` into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name in options:
            raise ConfigError(Problem(f"{key}.{name}", rest, options[name])) from error
        raise ConfigError(Problem(key, str(error))) from error
