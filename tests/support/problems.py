"""What bad input is refused with."""

import pytest

from let_plugin.config.errors import ConfigError


def problem_of(function, *args, **kwargs):
    """The one problem of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as info:
        function(*args, **kwargs)
    (problem,) = info.value.problems
    assert "\n" not in problem.message, problem.message
    return problem
