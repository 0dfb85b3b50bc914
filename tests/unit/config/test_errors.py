"""What a user reads after a mistake."""

import pytest

from let_plugin.config.errors import ConfigError, Problem, mentions, suggest


def test_problem_names_source_field_value_and_remedy():
    assert str(Problem("a.b", "too big", 3, "x.toml")) == "x.toml: a.b = 3: too big"
    assert str(Problem("a.b", "too big", "3")) == "a.b = '3': too big"
    assert str(Problem("a.b", "missing", source="x.toml")) == "x.toml: a.b: missing"


def test_none_is_a_value():
    assert str(Problem("a", "wrong", None)) == "a = None: wrong"


def test_config_error_holds_all_problems():
    problems = [Problem("a", "one"), Problem("b", "two")]
    error = ConfigError(iter(problems))
    assert error.problems == problems
    assert str(error) == "a: one\nb: two"
    assert isinstance(error, ValueError)


def test_config_error_of_one_problem():
    assert ConfigError(Problem("a", "one")).problems == [Problem("a", "one")]


def test_config_error_without_a_problem_is_a_bug():
    with pytest.raises(AssertionError):
        ConfigError([])


def test_suggest():
    assert suggest("steos", ["steps", "seq_len"]) == "did you mean 'steps'? valid names: seq_len, steps"
    assert suggest("xyz", ["steps", "steps"]) == "valid names: steps"
    assert suggest("xyz", []) == "valid names: (none)"


def test_mentions():
    assert mentions("must be at most training.steps = 4", "training.steps")
    assert mentions("set --training.steps", "training")
    assert not mentions("set training.steps_per_epoch", "training.steps")
    assert not mentions("nothing of letters", "let")
