"""Strict, suggesting, extensible through entry points."""

import importlib.metadata

import pytest

from let_plugin.alignment import registry as registry_module
from let_plugin.alignment.registry import Registry
from let_plugin.config.errors import ConfigError, lookup


@pytest.fixture
def registry():
    return Registry("colour", "let_plugin.test_colours")


def test_register_and_get(registry):
    assert registry.register("red", 1) == 1
    assert registry.get("red") == 1
    assert "red" in registry
    assert "blue" not in registry


def test_iterates_over_sorted_names(registry):
    for name in ("red", "blue", "green"):
        registry.register(name, name)
    assert list(registry) == ["blue", "green", "red"]


def test_duplicate_is_an_error_and_keeps_the_first(registry):
    registry.register("red", 1)
    with pytest.raises(ValueError, match="colour 'red' is registered already"):
        registry.register("red", 2)
    assert registry.get("red") == 1


def test_unknown_name_suggests(registry):
    registry.register("green", 1)
    message = r"unknown colour 'grene'; did you mean 'green'\? valid names: green$"
    with pytest.raises(LookupError, match=message):
        registry.get("grene")
    with pytest.raises(ConfigError, match=rf"^let\.colour = 'grene': {message}"):
        lookup(registry.get, "grene", key="let.colour")


def test_unregister(registry):
    registry.register("red", 1)
    registry.unregister("red")
    assert "red" not in registry
    with pytest.raises(KeyError):
        registry.unregister("red")


def test_entry_points_are_loaded_once_and_only_when_asked_for(registry, monkeypatch):
    groups = []

    def entry_points(*, group):
        groups.append(group)
        return [importlib.metadata.EntryPoint("pi", "math:pi", group)]

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    registry.register("red", 1)
    assert groups == []
    assert registry.get("pi") == pytest.approx(3.14159, abs=1e-5)
    assert list(registry) == ["pi", "red"]
    assert groups == ["let_plugin.test_colours"]
