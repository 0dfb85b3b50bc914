"""Types of configuration fields: what can be set, which values fit, and which classes can stand in for which."""

import contextlib
import dataclasses
import inspect
import math
import operator
import os
import typing
from collections.abc import Iterator
from dataclasses import MISSING
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro
from annotated_types import Ge
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from let_plugin.config.errors import Problem, raise_if_any, suggest

_SubcommandMarker: Any = type(tyro.conf.subcommand("name"))  # tyro does not export the class

# torchtitan's own numbers for which it would fail late or loop for ever.
TORCHTITAN_BOUNDS = {
    **dict.fromkeys(("training.steps", "training.local_batch_size", "training.seq_len", "training.gc_freq"), Ge(1)),
    **dict.fromkeys(("metrics.log_freq", "validator.freq"), Ge(1)),
    **dict.fromkeys(("training.max_norm", "lr_scheduler.warmup_steps"), Ge(0)),
}

_DESCRIPTIONS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a table"}
_DESCRIPTIONS |= dict.fromkeys((list, tuple), "an array")

# The bounds of annotated_types, by the names of their attributes and of the functions in `operator`.
_RELATIONS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


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
        # Where their number is wrong, the check below says so.
        value = origin(map(fit, value, args) if len(args) == len(value) else value)
    return check_type(value, expected, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)


def _bounds(hint: Any) -> Iterator[tuple[str, float]]:
    for item in _metadata(hint):
        yield from ((name, getattr(item, name)) for name in _RELATIONS if getattr(item, name, None) is not None)


def bounds_text(hint: Any) -> str:
    """The bounds that a type is annotated with, as in "at least 0 and less than 1"."""
    return " and ".join(f"{_RELATIONS[name]} {limit}" for name, limit in _bounds(hint))


def out_of_bounds(value: Any, hint: Any) -> str:
    """What the bounds of `hint` ask for; empty if `value` is within them. An annotated number is finite, too."""
    if type(value) not in (int, float) or not _metadata(hint):
        return ""
    finite = "" if math.isfinite(value) else "finite"
    if not finite and all(getattr(operator, name)(value, limit) for name, limit in _bounds(hint)):
        return ""
    return f"must be {' and '.join(filter(None, [finite, bounds_text(hint)]))}"


def bounded(key: str, hint: Any) -> Any:
    """The type of the field `key`, with the bounds of torchtitan's own numbers."""
    return Annotated[hint, TORCHTITAN_BOUNDS[key]] if key in TORCHTITAN_BOUNDS else hint


def check_bounds(config: Any) -> None:
    """ConfigError that lists every number of a configuration, wherever it comes from, that is out of its bounds."""
    judged = ((key, value, out_of_bounds(value, bounded(key, hint))) for key, hint, value in walk(config))
    raise_if_any(Problem(key, message, value) for key, value, message in judged if message)


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


def owner(cls: type) -> type:
    """What a `type` key names: the class that a configuration class configures, or, without one, itself."""
    return cls.__dict__.get("_owner") or cls


def types_by_name(alternatives: list[Arm]) -> dict[str, type]:
    """Name -> class that a `type` key of this field can choose by a short name; NoneType stands for "none".

    They are tyro's subcommand names, and every imported subclass of the field's classes whose name no other has.
    """
    found: dict[str, dict[str, type]] = {}
    stack = config_classes(alternatives)
    while stack:
        cls = stack.pop()
        stack += cls.__subclasses__()
        # dataclass(slots=True) makes a class anew and leaves the first one there. The newest, popped first, wins.
        if not inspect.isabstract(owner(cls)) and (name := owner(cls).__name__) != "Config":
            found.setdefault(name, {}).setdefault(f"{cls.__module__}.{cls.__qualname__}", cls)
    names = {name: next(iter(classes.values())) for name, classes in found.items() if len(classes) == 1}
    names |= {arm.name: arm.type for arm in alternatives if arm.name is not None}
    return names | ({"none": NoneType} if any(arm.type is NoneType for arm in alternatives) else {})


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
