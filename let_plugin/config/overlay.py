"""Overlays TOML tables onto configuration dataclasses, strictly, and collects every mistake on the way."""

import dataclasses
import pkgutil
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from types import NoneType
from typing import Any, Literal

from typeguard import TypeCheckError, check_type

from let_plugin.config import legacy_keys
from let_plugin.config.errors import Problem, mentions, suggest
from let_plugin.config.schema import (
    Arm,
    arms,
    config_classes,
    config_name,
    default_value,
    required_fields,
    settable_fields,
    types_by_name,
)

_DESCRIPTIONS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    tuple: "an array",
    dict: "a table",
}


class Overlay:
    """One pass over a TOML file. `problems` holds what was wrong; the result has the values that were right.

    Args:
        source: The file, for the problems.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self._keys_by_name: dict[str, list[str]] = {}

    def configuration(self, config: Any, tables: dict[str, Any]) -> Any:
        """`config` with the values of `tables`; its `__post_init__` checks, and those of changed tables, run again."""
        for key in _keys(config):
            self._keys_by_name.setdefault(key.rpartition(".")[2], []).append(key)
        return self.fields("", type(config), config, tables, [Arm(type(config))])

    def fields(self, key: str, cls: type, current: Any, table: dict[str, Any], alternatives: list[Arm]) -> Any:
        """The table called `key` as an instance of `cls`: on top of `current`, or new if `current` is None.

        Returns MISSING if no new one can be made.
        """
        num_problems = len(self.problems)
        hints = settable_fields(cls)
        changes = {}
        for name, value in table.items():
            field_key = _join(key, name)
            if name not in hints:
                self._unknown(field_key, name, value, cls, alternatives)
                continue
            old = default_value(cls, name) if current is None else getattr(current, name)
            changes[name] = self.value(field_key, value, hints[name], old)
        if current is None:
            for name in required_fields(cls):
                if name not in hints:
                    self._add(
                        key, f"{config_name(cls)} needs {name}, which only Python can set: choose a `base` that has it"
                    )
                elif name not in changes:
                    self._add(_join(key, name), f"missing; {config_name(cls)} needs it")
        changes = {name: value for name, value in changes.items() if value is not MISSING}
        if current is None and not changes.keys() >= set(required_fields(cls)):
            return MISSING
        try:
            return cls(**changes) if current is None else dataclasses.replace(current, **changes)
        except (ValueError, AssertionError) as error:
            if current is not None:
                return self._as_far_as_accepted(key, current, changes, table, self.problems[num_problems:])
            self._add(key, _complaint(error, cls))
            return MISSING

    def _as_far_as_accepted(
        self, key: str, config: Any, changes: dict[str, Any], table: dict[str, Any], wrong: list[Problem]
    ) -> Any:
        """`config` with those of the changes that its class accepts, each by itself or after others.

        The others become problems, unless the class complains about a key that is among those that are `wrong` already.
        """
        num_left = -1
        while len(changes) != num_left:
            num_left = len(changes)
            complaints = {}
            for name, value in list(changes.items()):
                try:
                    config = dataclasses.replace(config, **{name: value})
                    del changes[name]
                except (ValueError, AssertionError) as error:
                    complaints[name] = _complaint(error, type(config))
        for name, complaint in complaints.items():
            if not any(mentions(complaint, problem.key) for problem in wrong):
                self._add(_join(key, name), complaint, table[name])
        return config

    def value(self, key: str, value: Any, hint: Any, current: Any) -> Any:
        """`value`, checked against the type `hint`. `current` is the value that it replaces or, as a table, overlays.

        Returns `current` after adding a problem.
        """
        alternatives = arms(hint)
        if _is_none(value) and any(arm.type is NoneType for arm in alternatives):
            return None
        if config_classes(alternatives):
            if isinstance(value, dict):
                return self._config(key, value, alternatives, current)
            return self._wrong(key, value, "a table", current)
        types = [arm.type for arm in alternatives if arm.type is not NoneType]
        for expected in types:
            if type(value) is expected:  # first, so that 1 stays an int where the type is float | int
                return value
        if len(types) == 1:
            return self._single(key, value, types[0], current)
        num_problems = len(self.problems)
        for expected in types:
            result = self._single(key, value, expected, current)
            if len(self.problems) == num_problems:
                return result
            del self.problems[num_problems:]
        return self._wrong(key, value, " or ".join(map(_describe, types)), current)

    def _single(self, key: str, value: Any, expected: Any, current: Any) -> Any:
        origin, args = typing.get_origin(expected) or expected, typing.get_args(expected)
        if expected is Any:
            return self._untyped(key, value, current)
        if origin is Literal:
            if any(type(value) is type(arg) and value == arg for arg in args):
                return value
            self._add(key, f"not a valid choice; {suggest(str(value), map(str, args))}", value)
            return current
        if expected in (bool, int, str, float):
            if expected is float and type(value) in (int, float):
                return float(value)
            return value if type(value) is expected else self._wrong(key, value, _describe(expected), current)
        if origin is list:
            element = args[0] if args else Any
            if isinstance(value, dict) and config_classes(arms(element)):
                return self._elements(key, value, element, current)
            if not isinstance(value, list):
                return self._wrong(key, value, "an array", current)
            items = [self.value(f"{key}.{i}", item, element, MISSING) for i, item in enumerate(value)]
            return current if any(item is MISSING for item in items) else items
        if origin is tuple:
            if not isinstance(value, list):
                return self._wrong(key, value, "an array", current)
            if len(args) == 2 and args[1] is Ellipsis:
                args = args[:1] * len(value)
            if args and len(args) != len(value):
                return self._wrong(key, value, f"an array of {len(args)} elements", current)
            args = args or (Any,) * len(value)
            items = [self.value(f"{key}.{i}", item, args[i], MISSING) for i, item in enumerate(value)]
            return current if any(item is MISSING for item in items) else tuple(items)
        if origin is dict:
            if not isinstance(value, dict):
                return self._wrong(key, value, "a table", current)
            return self._merged(key, value, args[1] if args else Any, current)
        try:  # whatever else a user's own configuration class may hold
            return check_type(value, expected)
        except TypeCheckError as error:
            self._add(key, str(error), value)
            return current

    def _untyped(self, key: str, value: Any, current: Any) -> Any:
        """A value of a dict[str, Any], which has no type of its own: that of the value that it replaces, if any."""
        if isinstance(value, dict):
            return self._merged(key, value, Any, current)
        if isinstance(value, list):
            items = [self._untyped(f"{key}.{i}", item, None) for i, item in enumerate(value)]
            if isinstance(current, list | tuple):
                return type(current)(items)
            # Numbers become a tuple, as torch's optimizers and torchtitan write them (betas).
            return tuple(items) if items and all(type(item) in (int, float) for item in items) else items
        if type(current) is float and type(value) is int:
            return float(value)
        if type(current) is int and type(value) is float:
            return value  # for an optimizer, a number need not be whole because the one before was
        if type(current) in (bool, int, float, str) and type(value) is not type(current):
            return self._wrong(key, value, _describe(type(current)), current)
        return value

    def _merged(self, key: str, table: dict[str, Any], hint: Any, current: Any) -> dict[str, Any]:
        result = dict(current) if isinstance(current, dict) else {}
        for name, value in table.items():
            result[name] = self.value(f"{key}.{name}", value, hint, result.get(name, MISSING))
        return {name: value for name, value in result.items() if value is not MISSING}

    def _elements(self, key: str, table: dict[str, Any], hint: Any, current: Any) -> Any:
        """A table with integer keys overlays single elements of a list."""
        result = list(current) if isinstance(current, list) else []
        valid = [str(i) for i in range(len(result))]
        for name, value in table.items():
            if name not in valid:
                self._add(
                    f"{key}.{name}",
                    f"no such element; valid names: {', '.join(valid) or '(none: the list is empty)'}. "
                    f"[[{key}]] replaces the whole list",
                )
                continue
            result[int(name)] = self.value(f"{key}.{name}", value, hint, result[int(name)])
        return result

    def _config(self, key: str, table: dict[str, Any], alternatives: list[Arm], current: Any) -> Any:
        """A table for a field that holds a configuration, whose class a `type` key chooses."""
        classes = config_classes(alternatives)
        cls: type | None = classes[0] if len(classes) == 1 else None
        if dataclasses.is_dataclass(current):
            cls = type(current)
        if "type" in table:
            cls = self._chosen_class(_join(key, "type"), table["type"], alternatives)
            if cls is None:
                return current
            table = {name: value for name, value in table.items() if name != "type"}
        if cls is NoneType:
            for name, value in table.items():
                self._add(_join(key, name), 'not together with type = "none"', value)
            return None
        if cls is None:
            self._add(_join(key, "type"), f"missing; valid names: {', '.join(sorted(types_by_name(alternatives)))}")
            return current
        # A new class starts from its own defaults: what a name means may differ from one class to the next.
        new = self.fields(key, cls, current if type(current) is cls else None, table, alternatives)
        return current if new is MISSING else new

    def _chosen_class(self, key: str, name: Any, alternatives: list[Arm]) -> type | None:
        if not isinstance(name, str):
            return self._wrong(key, name, "a string", None)
        found = types_by_name(alternatives)
        if len(found.get(name, [])) == 1:
            return found[name][0]
        if name in found:
            paths = ", ".join(f"{cls.__module__}.{config_name(cls)}" for cls in found[name])
            self._add(key, f"more than one class is called that; give the full name: {paths}", name)
        elif "." not in name:
            self._add(key, f"unknown type; {suggest(name, found)}; or a full name: module.Class", name)
        else:
            return self._imported_class(key, name, config_classes(alternatives))
        return None

    def _imported_class(self, key: str, path: str, classes: Sequence[type]) -> type | None:
        try:
            found = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            self._add(key, f"cannot be imported: {error}", path)
            return None
        cls = found if dataclasses.is_dataclass(found) else getattr(found, "Config", None)
        if isinstance(cls, type) and issubclass(cls, tuple(classes)):
            return cls
        expected = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in classes)
        self._add(key, f"neither it nor its Config is a subclass of {expected}", path)
        return None

    def _unknown(self, key: str, name: str, value: Any, cls: type, alternatives: list[Arm]) -> None:
        old_keys = [(leaf, item, legacy_keys.explain(leaf)) for leaf, item in leaves(key, value)]
        others = {  # keyed by class: of its two names, the one of the subcommand comes last and stays
            other: choice
            for choice, found in types_by_name(alternatives).items()
            for other in found
            if dataclasses.is_dataclass(other) and name in settable_fields(other)
        }
        if name == "model_spec":
            self._add(key, "not a TOML key: `base` chooses the model")
        elif name in cls.__dataclass_fields__ and not name.startswith("_"):  # type: ignore[attr-defined]
            self._add(key, "only Python can set it: name a function of your own in `base`")
        elif any(message for _, _, message in old_keys):
            for leaf, item, message in old_keys:
                self._add(leaf, message or "unknown", item)
        elif others:
            self._add(
                key,
                f"not a key of {config_name(cls)}, but of type = {' or '.join(map(repr, sorted(others.values())))}",
                value,
            )
        elif name in self._keys_by_name:
            self._add(key, f"unknown; did you mean {' or '.join(self._keys_by_name[name][:3])}?", value)
        else:
            self._add(key, f"unknown; {suggest(name, settable_fields(cls))}", value)

    def _wrong(self, key: str, value: Any, expected: str, current: Any) -> Any:
        self._add(key, f"expected {expected}", value)
        return current

    def _add(self, key: str, message: str, value: Any = MISSING) -> None:
        has_value = value is not MISSING and not isinstance(value, dict)  # a table's content would bury the message
        self.problems.append(Problem(key, message, source=self.source, **({"value": value} if has_value else {})))


def _complaint(error: Exception, cls: type) -> str:
    return str(error) or f"{type(error).__name__} in {cls.__qualname__}"


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of everything that can be set in `config`."""
    for name in settable_fields(type(config)):
        key, value = _join(prefix, name), getattr(config, name)
        yield key
        children = {f"{key}.{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {key: value}
        for child_key, child in children.items():
            if dataclasses.is_dataclass(child):
                yield from _keys(child, child_key)
            elif isinstance(child, dict):
                yield from (f"{child_key}.{leaf}" for leaf in child)


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The dotted keys in the table called `key`, with their values; if `value` is no table, the two as they are."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(_join(key, name), item)
    else:
        yield key, value


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "none"  # "None" is what the command line calls it


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(expected)))}"
    return _DESCRIPTIONS.get(typing.get_origin(expected) or expected, str(expected))
