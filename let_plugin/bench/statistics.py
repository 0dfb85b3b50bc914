"""Estimates with 95 % intervals from paired measurements: made in turn on one machine, or with one seed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and Student's 95 % confidence interval. The interval is None for fewer than two values."""

    value: float
    low: float | None
    high: float | None
    num: int

    def contains(self, value: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= value <= self.high

    def text(self, form: str) -> str:
        """The value and its interval, each in the format `form`."""
        interval = "" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{interval}"


def quantiles(values: Sequence[float], probabilities: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> dict[str, float]:
    """Probability, as text -> quantile, linearly interpolated. ValueError if there are no values."""
    if not len(values):
        raise ValueError("no values")
    return {f"{p:g}": float(q) for p, q in zip(probabilities, np.quantile(values, probabilities), strict=True)}


def median(values: Sequence[float]) -> float:
    return quantiles(values, [0.5])["0.5"]


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values, one per seed for example. ValueError if there are none."""
    from scipy import stats

    num = len(values)
    if num == 0:
        raise ValueError("no values")
    center = float(np.mean(values))
    if num == 1:
        return Estimate(center, None, None, num)
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, num - 1))
    return Estimate(center, center - half, center + half, num)


def difference(values: Sequence[float], baselines: Sequence[float]) -> Estimate:
    """The mean of values - baselines over pairs. ValueError if they are not pairs."""
    return mean([a - b for a, b in zip(values, baselines, strict=True)])


def ratio(values: Sequence[float], baselines: Sequence[float]) -> Estimate:
    """The geometric mean of values / baselines over pairs: the interval is that of the mean logarithm.

    The inverse ratio has the inverse estimate. ValueError if they are not pairs, or a value is not positive.
    """
    center, low, high, num = difference(*([math.log(value) for value in some] for some in (values, baselines)))
    return Estimate(
        math.exp(center), None if low is None else math.exp(low), None if high is None else math.exp(high), num
    )


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
