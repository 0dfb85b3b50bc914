import pytest
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.schedules import linear


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (1, 0.9), (5, 0.5), (9, 0.1), (10, 0.0), (11, 0.0)])
def test_linear_before_at_and_past_its_end(step, expected):
    assert linear(step, stop_step=10) == pytest.approx(expected)


def test_linear_of_length_zero_is_zero():
    assert linear(0, stop_step=0) == 0.0


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_linear_falls_from_one_to_zero(step, stop_step):
    value = linear(step, stop_step=stop_step)
    assert 0 <= value <= 1
    assert (value == 0) == (step >= stop_step)
    assert linear(step + 1, stop_step=stop_step) <= value
