"""Options from TOML become keyword-only arguments, checked."""

from typing import Literal

from let_plugin.config import options
from tests.support.problems import problem_of, problems_of

IDS: dict[str, int] = {}


def function(
    step, *, stop_step, power: float = 2.0, mode: Literal["a", "b"] = "a", count: int = 1, ids: dict[str, int] = IDS
):
    if power <= 0:
        raise ValueError("power must be greater than 0")
    if count > stop_step:
        raise ValueError("the run is too short")
    return step, stop_step, power, mode, count


class Match:
    def __init__(self, in_width: int, out_width: int, *, seed: int = 0):
        self.args = in_width, out_width, seed


def test_options_are_bound():
    bound = options.bind(function, {"power": 3, "mode": "b"}, key="let.x")
    assert bound(1, stop_step=2) == (1, 2, 3.0, "b", 1)
    assert isinstance(bound(1, stop_step=2)[2], float)  # TOML's 3 where a number is wanted
    assert options.bind(Match, {"seed": 5}, key="let.x")(2, 3).args == (2, 3, 5)


def test_all_mistakes_at_once_each_with_its_key():
    given = {"powr": 3, "mode": "c", "count": True, "stop_step": 3, "ids": {"a": 0, "b": "1"}}  # not the caller's step
    problems = problems_of(options.bind, function, given, key="let.x").values()
    starts = ["powr = 3: no such option; did you mean 'power'?", "mode = 'c': ", "count = True: "]
    starts += ["stop_step = 3: no such", "ids = {'a': 0, 'b': '1'}: "]
    assert all(str(problem).startswith(f"let.x.{start}") for problem, start in zip(problems, starts, strict=True))


def test_a_value_that_the_function_refuses():
    bound = options.bind(function, {"power": -1.0}, key="let.x")
    assert str(problem_of(bound, 0, stop_step=1)) == "let.x.power = -1.0: must be greater than 0"
    bound = options.bind(function, {"count": 3}, key="let.x")
    assert str(problem_of(bound, 0, stop_step=1)) == "let.x: the run is too short"
