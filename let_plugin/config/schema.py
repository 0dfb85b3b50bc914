"""What can be set in a configuration class, and which classes can stand in for which: read from the classes.

Knows dataclasses and tyro's markers, not torchtitan: importing it imports neither torch nor torchtitan.
"""

import dataclasses
import inspect
import pkgutil
import typing
from dataclasses import MISSING
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union

import tyro

_SubcommandMarker: Any = type(tyro.conf.subcommand("name"))  # tyro does not export the class


class Arm(NamedTuple):
    """One alternative of a field's type; `name` is what tyro calls it where the field is a choice of subcommands."""

    type: Any
    name: str | None = None


def settable_fields(cls: type) -> dict[str, Any]:
    """Name -> type (with its annotations) of the fields that TOML and the command line can set.

    Not the ones whose name starts with an underscore, and not those that only Python can set (`model_spec`,
    callables), which torchtitan marks with `tyro.conf.Suppress`.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(cls)
        if f.init and not f.name.startswith("_") and tyro.conf.Suppress not in _metadata(hints[f.name])
    }


def default_value(cls: type, name: str) -> Any:
    """A field's default; MISSING if it is required."""
    field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default if field.default_factory is MISSING else field.default_factory()


def required_fields(cls: type) -> list[str]:
    """The names of the fields without a default, those that only Python can set included."""
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]


def arms(hint: Any) -> list[Arm]:
    """The alternatives of a type: those of a union, or the type itself."""
    markers = [m for m in _metadata(hint) if isinstance(m, _SubcommandMarker)]
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (Union, UnionType):
        return [arm for alternative in typing.get_args(hint) for arm in arms(alternative)]
    return [Arm(hint, markers[0].name if markers else None)]


def config_classes(alternatives: list[Arm]) -> list[type]:
    """The configuration classes among the alternatives of a type."""
    return [arm.type for arm in alternatives if isinstance(arm.type, type) and dataclasses.is_dataclass(arm.type)]


def config_name(cls: type) -> str:
    """What a `type` key calls a configuration class: the class that it configures, or, without one, itself."""
    return (cls.__dict__.get("_owner") or cls).__name__


def config_path(cls: type) -> str | None:
    """The fully qualified name of a configuration class for a `type` key; None if it cannot be imported."""
    owner = cls.__dict__.get("_owner") or cls
    path = f"{owner.__module__}.{owner.__qualname__}"
    try:
        return path if pkgutil.resolve_name(path) is owner else None
    except (ImportError, AttributeError, ValueError):
        return None


def types_by_name(alternatives: list[Arm]) -> dict[str, list[type]]:
    """Name -> classes (more than one if they share it) that a `type` key of this field can choose by a short name.

    They are tyro's subcommand names, and every imported subclass of the field's classes. NoneType stands for "none".
    """
    found: dict[str, list[type]] = {}
    for base in config_classes(alternatives):
        for cls in _subclasses(base):
            if not inspect.isabstract(cls.__dict__.get("_owner")) and config_name(cls) != "Config":
                found.setdefault(config_name(cls), []).append(cls)
    for arm in alternatives:
        if arm.type is NoneType:
            found["none"] = [NoneType]
        elif arm.name is not None:
            found[arm.name] = [arm.type]
    return found


def _subclasses(base: type) -> list[type]:
    # dataclass(slots=True) makes a class anew and leaves the first one in __subclasses__: the newest,
    # popped first, wins.
    found: dict[tuple[str, str], type] = {}
    stack = [base]
    while stack:
        cls = stack.pop()
        stack += cls.__subclasses__()
        found.setdefault((cls.__module__, cls.__qualname__), cls)
    return list(found.values())


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
