"""The inverse of the overlay: a configuration as TOML tables, complete, for overlaying on the same base."""

import contextlib
import dataclasses
import pkgutil
from dataclasses import MISSING
from types import NoneType
from typing import Any, get_args, get_origin

from let_plugin.config.errors import Problem, raise_if_any
from let_plugin.config.schema import Arm, arms, config_classes, default_value, join, owner, settable_fields


class _UnwritableError(Exception):
    """TOML has no way to write the value."""


def to_tables(config: Any, base: Any) -> dict[str, Any]:
    """Everything that can be set in `config`, as TOML tables that overlay `base`.

    What TOML cannot write is left out where `base` has the same value; elsewhere it is a ConfigError.
    """
    problems: list[Problem] = []
    tables = _fields("", config, base, problems)
    raise_if_any(problems)
    return tables


def _fields(prefix: str, config: Any, base: Any, problems: list[Problem]) -> dict[str, Any]:
    table = {}
    for name, hint in settable_fields(type(config)).items():
        key, value = join(prefix, name), getattr(config, name)
        base_value = getattr(base, name) if type(base) is type(config) else default_value(type(config), name)
        try:
            if value is not None or base_value is not None:
                table[name] = _value(key, value, hint, base_value, problems)
        except _UnwritableError as error:
            if value != base_value:
                problems.append(Problem(key, f"cannot be written as TOML: {error}", value))
    return table


def _value(key: str, value: Any, hint: Any, base: Any, problems: list[Problem]) -> Any:
    alternatives = arms(hint)
    if dataclasses.is_dataclass(value):
        return _type_key(type(value), alternatives, base) | _fields(key, value, base, problems)
    if value is None:
        if not any(arm.type is NoneType for arm in alternatives):
            raise _UnwritableError("there is no null in TOML")
        return {"type": "none"} if config_classes(alternatives) else "none"
    if isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
        (element,) = (get_args(arm.type)[0] for arm in alternatives if get_origin(arm.type) is list)
        return [_value(f"{key}.{i}", item, element, MISSING, problems) for i, item in enumerate(value)]
    return _plain(value)


def _type_key(cls: type, alternatives: list[Arm], base: Any) -> dict[str, str]:
    """The `type` key, where the class is neither the base's nor the only one that the field declares."""
    for arm in alternatives:
        if arm.type is cls and arm.name is not None:
            return {"type": arm.name}
    if type(base) is cls or [arm.type for arm in alternatives] == [cls]:
        return {}
    path = f"{owner(cls).__module__}.{owner(cls).__qualname__}"
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        if pkgutil.resolve_name(path) is owner(cls):
            return {"type": path}
    raise _UnwritableError(f"{path} cannot be imported by name")


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise _UnwritableError(f"a {type(value).__name__}")
