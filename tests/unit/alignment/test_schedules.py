import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.schedules import (
    SCHEDULES,
    ScheduleEntry,
    constant,
    cosine,
    exponential,
    get_schedule,
    linear,
    register_schedule,
    with_warmup,
)

NAMES = ["constant", "cosine", "exponential", "hard_stop", "linear"]

all_schedules = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # at the steps 0, 1, 5, 9, 10 and 11 of 10
        (linear, [1, 0.9, 0.5, 0.1, 0, 0]),
        (constant, [1, 1, 1, 1, 0, 0]),
        (cosine, [1, 0.9755283, 0.5, 0.0244717, 0, 0]),
        (exponential, [1, 0.6309573, 0.1, 0.0158489, 0, 0]),
        (with_warmup(linear, 4), [0.2, 0.4, 5 / 6, 1 / 6, 0, 0]),
        (with_warmup(linear, 9), [0.1, 0.2, 0.6, 1, 0, 0]),
        (with_warmup(linear, 19), [0.05, 0.1, 0.3, 0.5, 0, 0]),
    ],
)
def test_values_before_at_and_past_the_end(schedule, values):
    assert [schedule(step, stop_step=10) for step in (0, 1, 5, 9, 10, 11)] == pytest.approx(values, abs=1e-6)


def test_the_exponential_falls_to_its_option():
    assert exponential(5, stop_step=10, final=0.25) == pytest.approx(0.5)
    assert exponential(999, stop_step=1000, final=0.25) == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("final", [0.0, 1.0, -0.1, float("nan")])
def test_the_exponential_refuses_what_it_cannot_fall_to(final):
    for step in (0, 10):
        with pytest.raises(ValueError, match=r"^final must be greater than 0 and less than 1"):
            exponential(step, stop_step=10, final=final)


@all_schedules
def test_a_schedule_of_length_zero_is_zero(name):
    schedule = get_schedule(name).function
    assert schedule(0, stop_step=0) == with_warmup(schedule, 3)(0, stop_step=0) == 0


@all_schedules
@given(step=st.integers(0, 10**6), stop_step=st.integers(0, 10**6))
def test_every_schedule_falls_from_one_to_zero(name, step, stop_step):
    schedule = get_schedule(name).function
    value = schedule(step, stop_step=stop_step)
    assert 0 <= value <= 1
    assert (value == 0) == (step >= stop_step)
    assert schedule(step + 1, stop_step=stop_step) <= value
    assert schedule(0, stop_step=max(stop_step, 1)) == 1


@all_schedules
@given(step=st.integers(0, 10**6), stop_step=st.integers(0, 10**6), warmup_steps=st.integers(0, 10**6))
def test_a_warmed_up_schedule_rises_to_its_first_value_and_then_follows(name, step, stop_step, warmup_steps):
    schedule = get_schedule(name).function
    warmed_up = with_warmup(schedule, warmup_steps)
    value = warmed_up(step, stop_step=stop_step)
    assert math.isfinite(value) and 0 <= value <= 1
    assert (value == 0) == (step >= stop_step)
    if step + 1 < min(warmup_steps, stop_step):
        rise = warmed_up(step + 1, stop_step=stop_step) - value
        assert rise == pytest.approx(1 / (warmup_steps + 1), abs=1e-12)
    if step >= warmup_steps:
        assert value == schedule(step - warmup_steps, stop_step=stop_step - warmup_steps)


@all_schedules
@given(stop_step=st.integers(0, 40), warmup_steps=st.integers(0, 40), resumed_at=st.integers(0, 40))
def test_a_resumed_run_sees_the_values_of_one_that_never_stopped(name, stop_step, warmup_steps, resumed_at):
    def values(steps):
        schedule = with_warmup(get_schedule(name).function, warmup_steps)
        return [schedule(step, stop_step=stop_step) for step in steps]

    assert values(range(50))[resumed_at:] == values(range(resumed_at, 50))


def test_no_warmup_is_the_schedule_itself():
    assert with_warmup(linear, 0) is linear
    with pytest.raises(ValueError, match=r"^warmup_steps must not be negative"):
        with_warmup(linear, -1)


def test_the_registered_schedules():
    assert list(SCHEDULES) == NAMES
    fractions = {name: get_schedule(name).default_stop_fraction for name in NAMES}
    assert fractions == {**dict.fromkeys(NAMES, 0.5), "constant": 1.0}
    with pytest.raises(LookupError, match=r"did you mean 'linear'"):
        get_schedule("liner")


def test_a_schedule_of_ones_own_and_one_from_an_entry_point():
    register_schedule("whole", linear, default_stop_fraction=1.0)
    SCHEDULES.register("plain", linear)
    try:
        assert get_schedule("whole") == ScheduleEntry(linear, default_stop_fraction=1.0)
        assert get_schedule("plain") == ScheduleEntry(linear, default_stop_fraction=0.5)
    finally:
        SCHEDULES.unregister("whole")
        SCHEDULES.unregister("plain")
