"""The statistics, on series whose truth is known."""

import numpy as np
import pytest

from let_plugin.bench import statistics
from let_plugin.bench.statistics import median, paired_difference, paired_ratio, quantiles, step_at_loss

pytest.importorskip("scipy", reason="pip install let-plugin[bench]")

CURVE = [(10, 5.0), (20, 4.0), (30, 3.5)]


def test_quantiles():
    assert quantiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"0": 1, "0.25": 2, "0.5": 3, "0.75": 4, "1": 5}
    assert quantiles([1.0, 2.0], [0.1, 0.5]) == {"0.1": pytest.approx(1.1), "0.5": 1.5}
    assert median([3.0, 1.0, 2.0, 10.0]) == 2.5
    with pytest.raises(ValueError, match="no values"):
        median([])


@pytest.mark.parametrize("statistic", ["geometric_mean", "median"])
def test_a_known_ratio_comes_back_whatever_the_drift(statistic):
    """The machine becomes three times slower meanwhile; each pair sees the same machine."""
    baselines = np.geomspace(1, 3, 7)
    estimate = paired_ratio(1.04 * baselines, baselines, statistic)
    assert estimate.value == pytest.approx(1.04)
    assert (estimate.low, estimate.high) == (pytest.approx(1.04), pytest.approx(1.04))
    assert estimate.num_pairs == 7


def test_values_by_hand():
    assert paired_ratio([2.0, 8.0, 1.0], [1.0, 1.0, 1.0]).value == pytest.approx(16 ** (1 / 3))
    assert paired_ratio([2.0, 8.0, 1.0], [1.0, 1.0, 1.0], "median").value == pytest.approx(2)
    assert paired_difference([2.0, 8.0, 1.0], [1.0, 2.0, 3.0]).value == pytest.approx(5 / 3)


def test_the_inverse_ratio_has_the_inverse_interval():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(size=9), rng.lognormal(size=9)
    forth, back = paired_ratio(a, b), paired_ratio(b, a)
    assert back.value == pytest.approx(1 / forth.value)
    assert back.low == pytest.approx(1 / forth.high, rel=0.03) and back.high == pytest.approx(1 / forth.low, rel=0.03)


def test_the_interval_of_the_median_ends_at_ratios():
    ratios = [0.9, 0.95, 1.0, 1.1, 1.2, 1.3, 1.4]
    estimate = paired_ratio(ratios, [1.0] * 7, "median")
    assert (estimate.low, estimate.value, estimate.high) == (
        pytest.approx(0.9),
        pytest.approx(1.1),
        pytest.approx(1.4),
    )


def test_one_pair_has_no_interval():
    estimate = paired_ratio([2.0], [1.0])
    assert estimate == (pytest.approx(2.0), None, None, 1)
    assert not estimate.contains(2.0)


@pytest.mark.parametrize(("values", "baselines"), [([1.0, 2.0], [1.0]), ([], []), ([1.0, 0.0], [1.0, 1.0])])
def test_refused(values, baselines):
    with pytest.raises(ValueError):
        paired_ratio(values, baselines)


@pytest.mark.slow
@pytest.mark.parametrize("num_pairs", [5, 7, 20])
def test_coverage_of_the_mean(num_pairs):
    """Of 1,000 suites with a true ratio of 1.05, a drift and log-normal noise, about 950 intervals contain it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        drift = rng.uniform(1, 2, num_pairs)
        plain = drift * rng.lognormal(0, 0.02, num_pairs)
        case = 1.05 * drift * rng.lognormal(0, 0.02, num_pairs)
        hits += paired_ratio(case, plain).contains(1.05)
    assert 0.93 <= hits / 1000 <= 0.97


@pytest.mark.slow
def test_coverage_of_the_median_and_of_differences():
    rng = np.random.default_rng(0)
    medians = differences = 0
    for _ in range(500):
        plain = rng.lognormal(0, 0.02, 7)
        case = 1.05 * plain * (1 + 0.02 * rng.standard_t(3, 7))  # heavy tails
        medians += paired_ratio(case, plain, "median").contains(1.05)
        differences += paired_difference(rng.normal(0.3, 1, 7), rng.normal(0, 2, 7)).contains(0.3)
    assert 0.965 <= medians / 500 <= 0.995  # 98.4 %: what seven values allow
    assert 0.925 <= differences / 500 <= 0.975


@pytest.mark.parametrize(
    ("loss", "step"),
    [
        (4.0, 20.0),  # exactly at an evaluation
        (4.25, 17.5),
        (3.6, 28.0),
        (5.0, 10.0),
        (9.0, 10.0),  # reached before the first evaluation, which is the first that is known
        (3.5, 30.0),
        (3.4999, None),
    ],
)
def test_step_at_loss(loss, step):
    assert step_at_loss(CURVE, loss) == (step if step is None else pytest.approx(step))


def test_step_at_loss_is_the_first_one_of_a_curve_that_rises_again():
    assert step_at_loss([(1, 3.0), (2, 1.0), (3, 4.0), (4, 0.5)], 2.0) == 1.5
    assert step_at_loss([], 2.0) is None


def test_mean_of_seeds():
    estimate = statistics.mean([1.0, 2.0, 3.0])
    assert estimate.value == 2.0 and estimate.low == pytest.approx(2 - 4.302653 / 3**0.5)  # t of 2 degrees of freedom
    assert statistics.mean([1.0]).low is None
    with pytest.raises(ValueError):
        statistics.mean([])


def test_regression_is_the_mean_of_the_rounds_lines():
    xs = [0.0, 1.0, 3.0]
    line = statistics.regression(xs, [[1 + slope * x for x in xs] for slope in (1.0, 2.0, 3.0)])
    assert line.slope == pytest.approx(statistics.mean([1.0, 2.0, 3.0]))
    assert line.intercept.value == pytest.approx(1.0) and line.slope.num_pairs == 3


def test_no_line_through_one_size():
    with pytest.raises(ValueError, match="two different"):
        statistics.regression([1.0, 1.0], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="2 values"):
        statistics.regression([1.0, 2.0], [[1.0]])
