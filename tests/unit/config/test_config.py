"""The `[let]` and `[runtime]` tables, their reference, and what a user reads after a mistake."""

from operator import attrgetter

import pytest

from let_plugin.config import LetConfig, PairConfig, RuntimeConfig, reference
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.config.schema import check_bounds
from tests.support.jobs import ROOT


def test_the_reference_is_the_committed_one_and_every_key_has_a_text():
    text = reference.text()
    assert (ROOT / "docs/configuration.md").read_text() == text, (
        "run python -m let_plugin.config.reference > docs/configuration.md"
    )
    for cls in (LetConfig, RuntimeConfig):
        assert all(len(row[-1].split()) > 3 for row in reference.rows(cls))


# One of each kind, and of each place; docs/configuration.md has them all.
BOUNDS = [
    ("training.steps", 0, "at least 1"),
    ("training.max_norm", float("nan"), "finite and at least 0"),
    ("let.weight", float("inf"), "finite and at least 0"),
    ("let.temperature", 0.0, "more than 0"),
    ("let.stop_fraction", 1.5, "at least 0 and at most 1"),
    ("let.pairs.0.weight", -1.0, "at least 0"),
    ("let.teacher.center_momentum", 1.0, "at least 0 and less than 1"),
    ("let.adaptive_stop.threshold", float("nan"), "finite"),
]


@pytest.mark.parametrize(("key", "value", "message"), BOUNDS)
def test_bounds_of_what_python_sets(config, key, value, message):
    config.let.pairs = [PairConfig(student=0)]
    check_bounds(config)
    table, _, name = key.rpartition(".")
    setattr(config.let.pairs[0] if table == "let.pairs.0" else attrgetter(table)(config), name, value)
    with pytest.raises(ConfigError) as info:
        check_bounds(config)
    assert str(info.value) == f"{key} = {value!r}: must be {message}"


def test_config_error_names_source_field_value_and_remedy_of_all_problems():
    problems = [Problem("a.b", "too big", 3, "x.toml"), Problem("a", "wrong", None), Problem("c", "missing")]
    error = ConfigError(iter(problems))
    assert error.problems == problems
    assert str(error) == "x.toml: a.b = 3: too big\na = None: wrong\nc: missing"
    with pytest.raises(AssertionError):
        ConfigError([])
