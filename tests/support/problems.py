"""What bad input is refused with."""

import pytest

from let_plugin.config.errors import ConfigError


def problems_of(function, *args, **kwargs):
    """Dotted key -> problem of the ConfigError that a call raises; nothing is said twice."""
    with pytest.raises(ConfigError) as info:
        function(*args, **kwargs)
    problems = {problem.key: problem for problem in info.value.problems}
    assert len(problems) == len(info.value.problems)
    return problems


def problem_of(function, *args, **kwargs):
    """The one problem of the ConfigError that a call raises."""
    (problem,) = problems_of(function, *args, **kwargs).values()
    assert "\n" not in problem.message, problem.message
    return problem
