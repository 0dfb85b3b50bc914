"""Pure functions from measured values to what a report says about them.

Pairs are values measured under the same conditions, one of each kind: in turn on one machine, or with one seed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

PROBABILITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
_FEWEST_TO_RESAMPLE = 7

Statistic = Literal["geometric_mean", "median"]


class Estimate(NamedTuple):
    """A value and its 95 % confidence interval, out of `num_pairs` pairs; the interval is None for fewer than two."""

    value: float
    low: float | None
    high: float | None
    num_pairs: int

    def contains(self, value: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def quantiles(values: Sequence[float], probabilities: Sequence[float] = PROBABILITIES) -> dict[str, float]:
    """Probability, as text -> quantile of the values, linearly interpolated. ValueError if there are none."""
    if not len(values):
        raise ValueError("no values")
    return {f"{p:g}": float(q) for p, q in zip(probabilities, np.quantile(values, probabilities), strict=True)}


def median(values: Sequence[float]) -> float:
    """ValueError if there are none."""
    return quantiles(values, [0.5])["0.5"]


def mean(values: Sequence[float]) -> Estimate:
    """The mean, of one value per seed say. ValueError if there are none."""
    if not len(values):
        raise ValueError("no values")
    return _estimate(np.asarray(values, dtype=float), _mean)


class Line(NamedTuple):
    """y = intercept + slope * x, each with its interval."""

    intercept: Estimate
    slope: Estimate


def regression(xs: Sequence[float], rounds: Sequence[Sequence[float]]) -> Line:
    """Least squares in each round, a y for each x, and the mean of the rounds' lines.

    What is measured in one round has the noise of that round in common, so that the rounds are what is independent: the
    intervals are those of a mean over rounds. ValueError for fewer than two different xs, or rounds of another length.
    """
    if len(set(xs)) < 2:
        raise ValueError("a line needs two different xs")
    if not len(rounds) or any(len(ys) != len(xs) for ys in rounds):
        raise ValueError(f"expected {len(xs)} values in each round")
    slopes, intercepts = np.polyfit(np.asarray(xs, dtype=float), np.asarray(rounds, dtype=float).T, 1)
    return Line(_estimate(intercepts, _mean), _estimate(slopes, _mean))


def paired_ratio(
    values: Sequence[float], baselines: Sequence[float], statistic: Statistic = "geometric_mean"
) -> Estimate:
    """The ratio of paired, positive values to their baselines.

    The ratios of the pairs are averaged on the logarithmic scale, so that the estimate of the inverse ratio is the
    inverse estimate, or their median is taken. The interval of the mean covers as it says; that of the median of few
    pairs covers more, for it can only end at one of the ratios (of seven: 87.5 or 98.4 %, and it takes the latter).

    ValueError if the two are of different lengths or none, or a value is not positive.
    """
    pairs = _pairs(values, baselines)
    if not np.all(pairs > 0):
        raise ValueError("a value is not positive")
    ratios = np.log(pairs[0]) - np.log(pairs[1])
    of_logs = _mean if statistic == "geometric_mean" else _median
    value, low, high, num_pairs = _estimate(ratios, of_logs)
    low, high = (None if end is None else math.exp(end) for end in (low, high))
    return Estimate(math.exp(value), low, high, num_pairs)


def paired_difference(values: Sequence[float], baselines: Sequence[float]) -> Estimate:
    """The mean difference of paired values (values - baselines), of paired seeds say. ValueError as `paired_ratio`."""
    pairs = _pairs(values, baselines)
    return _estimate(pairs[0] - pairs[1], _mean)


def step_at_loss(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The step at which a curve of (step, loss) first reached `loss`, linearly between points; None if it never did."""
    previous: tuple[float, float] | None = None
    for step, value in curve:
        if value <= loss:
            if previous is None or value == previous[1]:
                return float(step)
            return previous[0] + (step - previous[0]) * (previous[1] - loss) / (previous[1] - value)
        previous = (step, value)
    return None


def _pairs(values: Sequence[float], baselines: Sequence[float]) -> np.ndarray:
    """[2, number of pairs]; ValueError if there are none, or they are not pairs."""
    if len(values) != len(baselines) or not len(values):
        raise ValueError(f"{len(values)} values and {len(baselines)} baselines are no pairs")
    return np.asarray([values, baselines], dtype=float)


def _mean(values: Any, axis: int = -1) -> Any:
    return np.mean(values, axis=axis)


def _median(values: Any, axis: int = -1) -> Any:
    return np.median(values, axis=axis)


def _estimate(values: np.ndarray, statistic: Callable[..., Any]) -> Estimate:
    """The statistic of a sample, with its interval by the expanded percentile bootstrap.

    The plain percentile interval is too narrow for few values: of seven it covers about 90 %, since a resample varies
    less than the sample does, by sqrt((n - 1) / n), and it takes normal quantiles for Student's. It is widened by
    asking for the quantiles that make up for both (Hesterberg, What Teachers Should Know About the Bootstrap, 2015,
    section 5.3; arXiv 1411.5279). Even so a bootstrap of five values covers 91 %, as no mean of a resample lies beyond
    the extremes; the mean of fewer than seven gets Student's interval.
    """
    from scipy import stats

    num = len(values)
    if num < 2 or np.ptp(values) == 0:
        end = None if num < 2 else float(values[0])
        return Estimate(float(statistic(values)), end, end, num)
    if num < _FEWEST_TO_RESAMPLE and statistic is _mean:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, num - 1) * np.std(values, ddof=1) / math.sqrt(num)
        return Estimate(float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half), num)
    tail = stats.norm.cdf(math.sqrt(num / (num - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, num - 1))
    interval = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=NUM_RESAMPLES,
        confidence_level=1 - 2 * tail,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),  # the same rows make the same report
    ).confidence_interval
    return Estimate(float(statistic(values)), float(interval.low), float(interval.high), num)
