"""Name -> object, strictly: a duplicate is an error, an unknown name suggests the nearest one.

Third-party packages add entries through the entry points of the registry's group, loaded at the first look-up.
"""

import difflib
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """What TOML keys select from. `kind` says in error messages what an entry is ("teacher spec")."""

    def __init__(self, kind: str, group: str) -> None:
        self._kind = kind
        self._groups = [group]  # whose entry points are to be loaded, at the first use
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> None:
        """Adds `entry` under `name`; ValueError if the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self._kind} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def get(self, name: str) -> T:
        """The entry called `name`; LookupError that suggests the nearest one if there is none."""
        self._load_entry_points()
        if name not in self._entries:
            raise LookupError(f"unknown {self._kind} {name!r}; {suggest(name, self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._entries))

    def _load_entry_points(self) -> None:
        while self._groups:
            for entry_point in entry_points(group=self._groups.pop()):
                self.register(entry_point.name, entry_point.load())


def suggest(name: str, valid: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest valid one if there is one, then all of them."""
    names = sorted(set(valid))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    did_you_mean = f"did you mean {near[0]!r}? " if near else ""
    return f"{did_you_mean}valid names: {', '.join(names) or '(none)'}"
