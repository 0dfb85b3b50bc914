"""The statistics, on series whose truth is known."""

import numpy as np
import pytest

from let_plugin.bench.statistics import difference, mean, median, quantiles, ratio, step_at_loss

pytest.importorskip("scipy", reason="pip install let-plugin[bench]")

CURVE = [(10, 5.0), (20, 4.0), (30, 3.5)]


def test_values_by_hand():
    assert quantiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"0": 1, "0.25": 2, "0.5": 3, "0.75": 4, "1": 5}
    assert quantiles([1.0, 2.0], [0.1, 0.5]) == {"0.1": pytest.approx(1.1), "0.5": 1.5}
    assert median([3.0, 1.0, 2.0, 10.0]) == 2.5
    assert ratio([2.0, 8.0, 1.0], [1.0, 1.0, 1.0]).value == pytest.approx(16 ** (1 / 3))
    assert difference([2.0, 8.0, 1.0], [1.0, 2.0, 3.0]).value == pytest.approx(5 / 3)
    estimate = mean([1.0, 2.0, 3.0])
    assert estimate.value == 2.0 and estimate.low == pytest.approx(2 - 4.302653 / 3**0.5)  # t of 2 degrees of freedom
    assert estimate.text("+.1f") == "+2.0 [-0.5, +4.5]"


def test_a_known_ratio_comes_back_whatever_the_drift():
    """The machine becomes three times slower meanwhile; each pair sees the same machine."""
    baselines = np.geomspace(1, 3, 7)
    estimate = ratio(1.04 * baselines, baselines)
    assert estimate == (pytest.approx(1.04), pytest.approx(1.04), pytest.approx(1.04), 7)


def test_the_intervals_are_those_of_a_paired_t_test():
    from scipy import stats

    rng = np.random.default_rng(1)
    a, b = rng.lognormal(size=9), rng.lognormal(size=9)
    expected = stats.ttest_rel(np.log(a), np.log(b)).confidence_interval()
    assert ratio(a, b)[1:3] == (pytest.approx(np.exp(expected.low)), pytest.approx(np.exp(expected.high)))
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert difference(a, b)[1:3] == (pytest.approx(expected.low), pytest.approx(expected.high))
    forth, back = ratio(a, b), ratio(b, a)
    assert back[:3] == (pytest.approx(1 / forth.value), pytest.approx(1 / forth.high), pytest.approx(1 / forth.low))


def test_one_pair_has_no_interval():
    estimate = ratio([2.0], [1.0])
    assert estimate == (pytest.approx(2.0), None, None, 1)
    assert not estimate.contains(2.0) and estimate.text(".1f") == "2.0"


@pytest.mark.parametrize(("values", "baselines"), [([1.0, 2.0], [1.0]), ([], []), ([1.0, 0.0], [1.0, 1.0])])
def test_refused(values, baselines):
    with pytest.raises(ValueError):
        ratio(values, baselines)


@pytest.mark.parametrize("num_pairs", [5, 7, 20])
def test_coverage(num_pairs):
    """Of 1,000 suites with a true ratio of 1.05, a drift and log-normal noise, about 950 intervals contain it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        drift = rng.uniform(1, 2, num_pairs)
        plain = drift * rng.lognormal(0, 0.02, num_pairs)
        case = 1.05 * drift * rng.lognormal(0, 0.02, num_pairs)
        hits += ratio(case, plain).contains(1.05)
    assert 0.93 <= hits / 1000 <= 0.97


@pytest.mark.parametrize(
    ("curve", "loss", "step"),
    [
        (CURVE, 4.0, 20.0),  # exactly at an evaluation
        (CURVE, 4.25, 17.5),
        (CURVE, 3.6, 28.0),
        (CURVE, 9.0, 10.0),  # reached before the first evaluation, which is the first that is known
        (CURVE, 3.5, 30.0),
        (CURVE, 3.4999, None),
        ([(1, 3.0), (2, 1.0), (3, 4.0), (4, 0.5)], 2.0, 1.5),  # a curve that rises again: the first time
        ([], 2.0, None),
    ],
)
def test_step_at_loss(curve, loss, step):
    assert step_at_loss(curve, loss) == (step if step is None else pytest.approx(step))
