import pytest
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.adaptive_stop import AdaptiveStop


def stop_after(values, **kwargs):
    stop = AdaptiveStop(**{"threshold": 0.0, "smoothing": 0.0, "patience": 1, **kwargs})
    for step, value in enumerate(values):
        stop.update(value, next_step=step + 1)
    return stop.stop_step


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ([1, 1, 1], 1, None),
        ([1, -1, 1], 1, 2),
        ([1, -1, 1, -1, -1], 2, 5),  # in a row
        ([-1, -1, -1, 1], 3, 3),  # later measurements change nothing
        ([0, 0], 1, None),  # below, not at
        ([], 1, None),
        ([-1, float("nan"), float("inf"), -1], 2, 4),  # what is not finite is no measurement
    ],
)
def test_it_stops_after_so_many_in_a_row(values, patience, expected):
    assert stop_after(values, patience=patience) == expected


def test_the_average_is_corrected_for_its_start():
    stop = AdaptiveStop(threshold=0.0, smoothing=0.9, patience=1)
    assert stop.update(-2.0, next_step=1) == pytest.approx(-2.0)
    assert stop.update(1.0, next_step=2) == pytest.approx((0.09 * -2.0 + 0.1 * 1.0) / 0.19)


@given(
    st.lists(st.floats(-1, 1), max_size=20), st.integers(0, 20), st.floats(-1, 1), st.floats(0, 0.99), st.integers(1, 4)
)
def test_restored_at_any_point_it_goes_on_as_if_nothing_had_happened(values, cut, threshold, smoothing, patience):
    settings = {"threshold": threshold, "smoothing": smoothing, "patience": patience}
    whole, before, after = (AdaptiveStop(**settings) for _ in range(3))
    for step, value in enumerate(values):
        whole.update(value, next_step=step)
        if step < cut:
            before.update(value, next_step=step)
    after.load_state_dict(before.state_dict())
    for step, value in list(enumerate(values))[cut:]:
        after.update(value, next_step=step)
    assert after.stop_step == whole.stop_step
    assert all(a.equal(b) for a, b in zip(after.state_dict().values(), whole.state_dict().values(), strict=True))
