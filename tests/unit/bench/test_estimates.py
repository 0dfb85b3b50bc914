"""The statistics, on series whose truth is known."""

import numpy as np
import pytest

from let_plugin.bench.frame import difference, mean, ratio, step_at_loss

pytest.importorskip("scipy", reason="pip install let-plugin[bench]")

CURVE = [(10, 5.0), (20, 4.0), (30, 3.5)]


def test_the_intervals_are_those_of_a_paired_t_test():
    from scipy import stats

    assert mean([1.0, 2.0, 3.0]).text("+.1f", "x") == "+2.0x [-0.5, +4.5]"
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


def test_coverage():
    """Of 1,000 suites with a true ratio of 1.05, a drift and log-normal noise, about 950 intervals contain it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        drift = rng.uniform(1, 2, 7)
        plain = drift * rng.lognormal(0, 0.02, 7)
        hits += ratio(1.05 * drift * rng.lognormal(0, 0.02, 7), plain).contains(1.05)
    assert 0.93 <= hits / 1000 <= 0.97


@pytest.mark.parametrize(
    ("curve", "loss", "step"),
    [
        (CURVE, 4.0, 20.0),  # exactly at an evaluation
        (CURVE, 4.25, 17.5),
        (CURVE, 9.0, 10.0),  # reached before the first evaluation, which is the first that is known
        (CURVE, 3.5, 30.0),
        (CURVE, 3.4999, None),
        ([(1, 3.0), (2, 1.0), (3, 4.0), (4, 0.5)], 2.0, 1.5),  # a curve that rises again: the first time
        ([], 2.0, None),
    ],
)
def test_step_at_loss(curve, loss, step):
    assert step_at_loss(curve, loss) == (step if step is None else pytest.approx(step))
