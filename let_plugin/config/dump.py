"""The inverse of the overlay: a configuration as TOML tables, complete, for overlaying on the same base."""

import dataclasses
from dataclasses import MISSING
from types import NoneType
from typing import Any

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.config.schema import (
    Arm,
    arms,
    config_classes,
    config_name,
    config_path,
    default_value,
    settable_fields,
    types_by_name,
)


class _UnwritableError(Exception):
    """TOML has no way to write the value."""


def to_tables(config: Any, base: Any) -> dict[str, Any]:
    """Everything that can be set in `config`, as TOML tables that overlay `base`.

    What TOML cannot write is left out where `base` has the same value; elsewhere it is a ConfigError.
    """
    problems: list[Problem] = []
    tables = _fields("", config, base, problems)
    if problems:
        raise ConfigError(problems)
    return tables


def _fields(prefix: str, config: Any, base: Any, problems: list[Problem]) -> dict[str, Any]:
    table = {}
    for name, hint in settable_fields(type(config)).items():
        key = f"{prefix}.{name}" if prefix else name
        value = getattr(config, name)
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
        type_key = _type_key(value, alternatives, base)
        return type_key | _fields(key, value, base, problems)
    if value is None:
        if not any(arm.type is NoneType for arm in alternatives):
            raise _UnwritableError("there is no null in TOML")
        return {"type": "none"} if config_classes(alternatives) else "none"
    if isinstance(value, str) and value.lower() == "none" and any(arm.type is NoneType for arm in alternatives):
        raise _UnwritableError("the text would be read as no value")
    if isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
        element = next(arm.type.__args__[0] for arm in alternatives if getattr(arm.type, "__origin__", None) is list)
        return [_value(f"{key}.{i}", item, element, MISSING, problems) for i, item in enumerate(value)]
    types = [arm.type for arm in alternatives]
    if type(value) is int and float in types and int not in types:
        return float(value)  # a base may say 0 where a float belongs; reading the text again makes it one
    return _plain(value)


def _type_key(value: Any, alternatives: list[Arm], base: Any) -> dict[str, str]:
    """The `type` key, where the class needs one: it is not the declared one, or the field is a choice."""
    cls = type(value)
    if [arm.type for arm in alternatives] == [cls]:
        return {}
    names = types_by_name(alternatives)
    for arm in alternatives:
        if arm.type is cls and arm.name is not None:
            return {"type": arm.name}
    # A short name is only known once its module is imported. The base imports that of its own class.
    if type(base) is cls and names.get(config_name(cls)) == [cls]:
        return {"type": config_name(cls)}
    path = config_path(cls)
    if path is not None:
        return {"type": path}
    if type(base) is cls:
        return {}
    raise _UnwritableError(f"{cls.__module__}.{cls.__qualname__} cannot be imported by name")


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise _UnwritableError(f"a {type(value).__name__}")
