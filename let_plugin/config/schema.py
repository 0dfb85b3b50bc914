"""Types of configuration fields: what can be set, which values fit, and which classes can stand in for which.

Everything is read from the classes. Knows dataclasses, tyro's markers and `annotated_types`, not torchtitan: importing
this module imports neither torch nor torchtitan.
"""

import contextlib
import dataclasses
import inspect
import math
import operator
import os
import pkgutil
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro
from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Le, Lt
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from let_plugin.config.errors import ConfigError, Problem, suggest

_SubcommandMarker: Any = type(tyro.conf.subcommand("name"))  # tyro does not export the class

# torchtitan's own numbers for which it would fail late or loop for ever.
TORCHTITAN_BOUNDS: dict[str, BaseMetadata] = {
    "training.steps": Ge(1),
    "training.local_batch_size": Ge(1),
    "training.seq_len": Ge(1),
    "training.max_norm": Ge(0),
    "training.gc_freq": Ge(1),
    "metrics.log_freq": Ge(1),
    "validator.freq": Ge(1),
    "lr_scheduler.warmup_steps": Ge(0),
}

_DESCRIPTIONS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    tuple: "an array",
    dict: "a table",
}


_RELATIONS: dict[type, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("at least", operator.ge),
    Gt: ("more than", operator.gt),
    Le: ("at most", operator.le),
    Lt: ("less than", operator.lt),
}


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


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, value) of everything that can be set in `config`, tables and keys of free tables included."""
    for name, hint in settable_fields(type(config)).items():
        key, value = join(prefix, name), getattr(config, name)
        yield key, hint, value
        children = {f"{key}.{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {key: value}
        for child_key, child in children.items():
            if dataclasses.is_dataclass(child):
                yield from walk(child, child_key)
            elif isinstance(child, dict):
                yield from ((f"{child_key}.{leaf}", Any, item) for leaf, item in child.items())


def join(key: str, name: str) -> str:
    """The dotted key of `name` in the table called `key`."""
    return f"{key}.{name}" if key else name


# --- values


def fit(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it; ValueError that says what is expected if it has another type or is out of
    the bounds that `hint` is annotated with.

    An integer may stand for a float, and an array for a tuple. "~/" at the start of a text is the home folder.
    """
    types = [arm.type for arm in arms(hint)]
    # The type that it has comes first, so that 1 stays an int where the type is float | int.
    for expected in sorted(types, key=lambda expected: type(value) is not expected):
        with contextlib.suppress(TypeCheckError):
            result = _converted(value, expected)
            if message := out_of_bounds(result, hint):
                raise ValueError(message)
            return result
    types = [expected for expected in types if expected is not NoneType]
    if all(typing.get_origin(expected) is Literal for expected in types):
        choices = [str(choice) for expected in types for choice in typing.get_args(expected)]
        raise ValueError(f"not a valid choice; {suggest(str(value), choices)}")
    raise ValueError(f"expected {' or '.join(map(describe, types))}")


def _converted(value: Any, expected: Any) -> Any:
    origin, args = typing.get_origin(expected) or expected, typing.get_args(expected)
    if expected is float and type(value) is int:
        return float(value)
    if expected in (int, float) and type(value) is bool:  # a number for Python
        raise TypeCheckError("is not a number")
    if isinstance(value, str) and value.startswith("~/"):
        value = os.path.expanduser(value)
    if isinstance(value, list) and origin in (list, tuple):
        if origin is list or not args or args[-1] is Ellipsis:
            args = (args[0] if args else Any,) * len(value)
        if len(args) != len(value):
            raise ValueError(f"expected an array of {len(args)} elements")
        items = []
        for i, (item, item_type) in enumerate(zip(value, args, strict=True)):
            try:
                items.append(fit(item, item_type))
            except ValueError as error:
                raise ValueError(f"element {i}: {error}") from error
        return origin(items)
    return check_type(value, expected, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)


def bounds_text(hint: Any) -> str:
    """The bounds that a type is annotated with, as in "at least 0 and less than 1"."""
    return " and ".join(f"{_RELATIONS[type(bound)][0]} {_limit(bound)}" for bound in _bounds(hint) or ())


def out_of_bounds(value: Any, hint: Any) -> str:
    """What the bounds of `hint` ask for; empty if `value` is within them. A number with bounds is finite, too."""
    bounds = _bounds(hint)
    if bounds is None or type(value) not in (int, float):
        return ""
    if not math.isfinite(value):
        return " and ".join(filter(None, ["must be finite", bounds_text(hint)]))
    kept = all(_RELATIONS[type(bound)][1](value, _limit(bound)) for bound in bounds)
    return "" if kept else f"must be {bounds_text(hint)}"


def _bounds(hint: Any) -> list[BaseMetadata] | None:
    """None if `hint` has none; `Interval()` is an empty list."""
    groups = [item for item in _metadata(hint) if isinstance(item, GroupedMetadata | BaseMetadata)]
    bounds: list[Any] = [
        bound for group in groups for bound in (group if isinstance(group, GroupedMetadata) else [group])
    ]
    return bounds if groups else None


def _limit(bound: Any) -> float:
    return getattr(bound, type(bound).__name__.lower())


def bounded(key: str, hint: Any) -> Any:
    """The type of the field `key`, with the bounds of torchtitan's own numbers."""
    return Annotated[hint, TORCHTITAN_BOUNDS[key]] if key in TORCHTITAN_BOUNDS else hint


def check_bounds(config: Any) -> None:
    """ConfigError that lists every number of a configuration, wherever it comes from, that is out of its bounds."""
    judged = ((key, value, out_of_bounds(value, bounded(key, hint))) for key, hint, value in walk(config))
    if problems := [Problem(key, message, value) for key, value, message in judged if message]:
        raise ConfigError(problems)


def describe(expected: Any) -> str:
    """What TOML calls a type."""
    if typing.get_origin(expected) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(expected)))}"
    return _DESCRIPTIONS.get(typing.get_origin(expected) or expected, str(expected))


# --- classes


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
