import pytest
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.schedules import SCHEDULES, constant, cosine, linear, with_warmup

LENGTHS = st.integers(0, 10**6)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # at the steps 0, 1, 5, 9, 10 and 11 of 10
        (linear, [1, 0.9, 0.5, 0.1, 0, 0]),
        (constant, [1, 1, 1, 1, 0, 0]),
        (cosine, [1, 0.9755283, 0.5, 0.0244717, 0, 0]),
        (with_warmup(linear, 4), [0.2, 0.4, 5 / 6, 1 / 6, 0, 0]),
        (with_warmup(linear, 9), [0.1, 0.2, 0.6, 1, 0, 0]),
        (with_warmup(linear, 19), [0.05, 0.1, 0.3, 0.5, 0, 0]),
    ],
)
def test_values_before_at_and_past_the_end(schedule, values):
    assert [schedule(step, stop_step=10) for step in (0, 1, 5, 9, 10, 11)] == pytest.approx(values, abs=1e-6)


@given(st.sampled_from(list(SCHEDULES)), LENGTHS, LENGTHS, st.one_of(st.just(0), LENGTHS))
def test_every_schedule_rises_as_it_is_warmed_up_and_falls_to_zero(name, step, stop_step, warmup_steps):
    schedule = SCHEDULES.get(name)
    warmed_up = with_warmup(schedule, warmup_steps)
    value, after = (warmed_up(i, stop_step=stop_step) for i in (step, step + 1))
    assert 0 <= value <= 1
    assert (value == 0) == (step >= stop_step)
    if step + 1 < min(warmup_steps, stop_step):
        assert after - value == pytest.approx(1 / (warmup_steps + 1), abs=1e-12)
    if step >= warmup_steps:
        assert after <= value == schedule(step - warmup_steps, stop_step=stop_step - warmup_steps)
    assert schedule(0, stop_step=max(stop_step, 1)) == 1
