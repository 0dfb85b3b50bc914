"""Overlays TOML tables onto configuration dataclasses, strictly, and collects every mistake on the way."""

import dataclasses
import pkgutil
import typing
from dataclasses import MISSING
from types import NoneType
from typing import Any

from let_plugin.config import schema
from let_plugin.config.command_line import Argument
from let_plugin.config.errors import Problem, suggest
from let_plugin.config.schema import Arm, arms, config_classes, default_value, join, types_by_name

# What keys and tables of torchtitan's own TOML files, up to version 0.2, are called now, and one of [let], where no
# suggestion would say so. Only for messages: many of them mean something slightly different now.
OLD_KEYS = {
    "let.target": 'let.signal = "states" (once "teacher"), "labels" or "logits"; several of them are [[let.terms]]',
    "job": "dump_folder is a top-level key, print_config and save_config_file are in [debug]; leave out the rest",
    "model": "`base` chooses the model; hf_assets_path (once tokenizer_path, too) is a top-level key",
    "experimental": "[parallelism] and [compile]; a function of your own is named in `base`",
    **dict.fromkeys(("float8", "mx", "quantize"), "gone; they are part of the model: choose a `base` that has them"),
    "metrics.enable_color_printing": "metrics.disable_color_printing, with the opposite value",
    "metrics.rank_0_only": "metrics.save_for_all_ranks, with the opposite value",
    "optimizer.name": "optimizer.param_groups.0.optimizer_name",
    **dict.fromkeys(("optimizer.beta1", "optimizer.beta2"), "optimizer.param_groups.0.optimizer_kwargs.betas"),
    "optimizer.fused": 'optimizer.implementation = "fused", "foreach" or "for-loop"',
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "activation_checkpoint.mode": 'activation_checkpoint.type = "selective", "full", "memory-budget" or "none"',
    "activation_checkpoint.selective_ac_option": 'gone; type = "selective" is what "op" was',
}


class Overlay:
    """One pass over the tables of a source, a file or the command line.

    `problems` holds what was wrong; the result has the values that were right.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self._keys_by_name: dict[str, list[str]] = {}

    def configuration(self, config: Any, tables: dict[str, Any]) -> Any:
        """`config` with the values of `tables`; its `__post_init__` checks, and those of changed tables, run again."""
        for key, _, _ in schema.walk(config):
            self._keys_by_name.setdefault(key.rpartition(".")[2], []).append(key)
        return self._fields("", type(config), config, tables)

    def _fields(self, key: str, cls: type, current: Any, table: dict[str, Any]) -> Any:
        """The table called `key` as an instance of `cls`: on top of `current`, or new if `current` is None.

        Returns `current` if nothing can be made of it.
        """
        hints, changes = schema.settable_fields(cls), {}
        for name, value in table.items():
            if name not in hints:
                self._unknown(join(key, name), name, value, cls)
                continue
            old = default_value(cls, name) if current is None else getattr(current, name)
            new = self.value(join(key, name), value, hints[name], old)
            if new is not MISSING:
                changes[name] = new
        if current is None:
            required = {f.name for f in dataclasses.fields(cls) if f.init and default_value(cls, f.name) is MISSING}
            for name in sorted(required - table.keys()):
                self._add(join(key, name), f"missing; {schema.owner(cls).__name__} needs it")
            if required - changes.keys():
                return MISSING
        try:
            return cls(**changes) if current is None else dataclasses.replace(current, **changes)
        except (ValueError, AssertionError) as error:
            if current is not None:
                return self._one_by_one(key, current, changes, table)
            return self._add(key, _complaint(error), current=MISSING)

    def _one_by_one(self, key: str, config: Any, changes: dict[str, Any], table: dict[str, Any]) -> Any:
        """`config` with those of the changes that its class accepts; the others become problems."""
        complaints: dict[str, str] = {}
        for name, value in [*changes.items()] * 2:  # twice, as one may be right only after another
            try:
                config = dataclasses.replace(config, **{name: value})
                complaints.pop(name, None)
            except (ValueError, AssertionError) as error:
                complaints[name] = _complaint(error)
        for name, complaint in complaints.items():
            self._add(join(key, name), complaint, table[name])
        return config

    def value(self, key: str, value: Any, hint: Any, current: Any) -> Any:
        """`value`, checked against the type `hint`. `current` is the value that it replaces or, as a table, overlays.

        Returns `current` after adding a problem.
        """
        if isinstance(value, Argument):
            return self._argument(key, value, hint, current)
        alternatives = arms(hint)
        if isinstance(value, str) and value.lower() == "none" and any(arm.type is NoneType for arm in alternatives):
            return None  # "None" is what the command line calls it
        if config_classes(alternatives):
            if isinstance(value, dict):
                return self._config(key, value, alternatives, current)
            return self._add(key, "expected a table", value, current)
        for arm in alternatives:
            origin, args = typing.get_origin(arm.type) or arm.type, typing.get_args(arm.type)
            if isinstance(value, dict) and origin in (dict, Any):
                return self._merged(key, value, args[1] if args else Any, current)
            if origin is list and args and config_classes(arms(args[0])):
                if isinstance(value, dict):
                    return self._elements(key, value, args[0], current)
                if isinstance(value, list):
                    items = [self.value(f"{key}.{i}", item, args[0], MISSING) for i, item in enumerate(value)]
                    return current if any(item is MISSING for item in items) else items
        try:
            return _untyped(value, current) if hint is Any else schema.fit(value, schema.bounded(key, hint))
        except ValueError as error:
            return self._add(key, str(error), value, current)

    def _argument(self, key: str, argument: Argument, hint: Any, current: Any) -> Any:
        """The first reading of a command-line argument that fits; if none does, what is wrong with the first."""
        start = len(self.problems)
        complaints: list[Problem] = []
        for reading in argument.readings():
            result = self.value(key, reading, hint, current)
            found = self.problems[start:]
            del self.problems[start:]
            if not found:
                return result
            complaints = complaints or found
        self.problems += complaints
        return current

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
            if name in valid:
                result[int(name)] = self.value(f"{key}.{name}", value, hint, result[int(name)])
            else:
                message = f"no such element; {suggest(name, valid)}. [[{key}]] replaces the whole list"
                self._add(f"{key}.{name}", message)
        return result

    def _config(self, key: str, table: dict[str, Any], alternatives: list[Arm], current: Any) -> Any:
        """A table for a field that holds a configuration, whose class a `type` key chooses."""
        classes = config_classes(alternatives)
        only = classes[0] if len(classes) == 1 else None
        cls = type(current) if dataclasses.is_dataclass(current) else only
        if "type" in table:
            name = self.value(join(key, "type"), table["type"], str, None)
            cls = None if name is None else self._chosen_class(join(key, "type"), name, alternatives)
            if cls is None:
                return current
            table = {name: value for name, value in table.items() if name != "type"}
        if cls is NoneType:
            for name, value in table.items():
                self._add(join(key, name), 'not together with type = "none"', value)
            return None
        if cls is None:
            return self._add(join(key, "type"), f"missing; {suggest('', types_by_name(alternatives))}", current=current)
        # A new class starts from its own defaults: what a name means may differ from one class to the next.
        new = self._fields(key, cls, current if type(current) is cls else None, table)
        return current if new is MISSING else new

    def _chosen_class(self, key: str, name: str, alternatives: list[Arm]) -> type | None:
        names = types_by_name(alternatives)
        if name in names:
            return names[name]
        if "." not in name:
            return self._add(key, f"unknown type; {suggest(name, names)}; or a full name: module.Class", name)
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            return self._add(key, f"cannot be imported: {error}", name)
        cls = found if dataclasses.is_dataclass(found) else getattr(found, "Config", None)
        classes = config_classes(alternatives)
        if isinstance(cls, type) and issubclass(cls, tuple(classes)):
            return cls
        expected = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in classes)
        return self._add(key, f"neither it nor its Config is a subclass of {expected}", name)

    def _unknown(self, key: str, name: str, value: Any, cls: type) -> None:
        if key in OLD_KEYS:
            message = f"a key of an older version; now: {OLD_KEYS[key]}"
        elif name in getattr(cls, "__dataclass_fields__", ()) and not name.startswith("_"):
            message = "only Python can set it: name a function that does in `base`"
        elif name in self._keys_by_name:
            message = f"unknown; did you mean {' or '.join(self._keys_by_name[name][:3])}?"
        else:
            message = f"unknown; {suggest(name, schema.settable_fields(cls))}"
        self._add(key, message, value)

    def _add(self, key: str, message: str, value: Any = MISSING, current: Any = None) -> Any:
        """Adds a problem and returns `current`, which stays."""
        if isinstance(value, Argument):
            value = next(value.readings()) if value else MISSING
        has_value = value is not MISSING and not isinstance(value, dict)  # a table's content would bury the message
        self.problems.append(Problem(key, message, source=self.source, **({"value": value} if has_value else {})))
        return current


def _untyped(value: Any, current: Any) -> Any:
    """A value of a dict[str, Any], which has no type of its own: that of the value that it replaces, if any."""
    # For an optimizer, a number need not be whole because the one before was.
    hint = {bool: bool, int: float | int, float: float, str: str}.get(type(current), Any)
    numbers = isinstance(value, list) and value and all(type(item) in (int, float) for item in value)
    if isinstance(value, list) and (isinstance(current, tuple) or (numbers and not isinstance(current, list))):
        return tuple(value)  # as torch's optimizers and torchtitan write numbers (betas)
    return schema.fit(value, hint)


def _complaint(error: Exception) -> str:
    return str(error) or type(error).__name__
