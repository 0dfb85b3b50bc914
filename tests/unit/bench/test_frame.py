"""The statistics, on series whose truth is known; and known ratios come out of rows as they are."""

import numpy as np
import pytest
from scipy import stats

from let_plugin.bench import frame, rows
from let_plugin.bench.frame import mean, ratio, step_at_loss
from let_plugin.config.errors import ConfigError
from tests.support import synthetic_rows


def test_the_intervals_are_those_of_a_paired_t_test():
    assert mean([1.0, 2.0, 3.0]).text("+.1f", "x") == "+2.0x [-0.5, +4.5]"
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(size=9), rng.lognormal(size=9)
    expected = stats.ttest_rel(np.log(a), np.log(b)).confidence_interval()
    assert ratio(a, b)[1:3] == (pytest.approx(np.exp(expected.low)), pytest.approx(np.exp(expected.high)))
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert mean(list(a - b))[1:3] == (pytest.approx(expected.low), pytest.approx(expected.high))
    forth, back = ratio(a, b), ratio(b, a)
    assert back[:3] == (pytest.approx(1 / forth.value), pytest.approx(1 / forth.high), pytest.approx(1 / forth.low))


# At an evaluation; between two; before the first, which is the first that is known; never.
@pytest.mark.parametrize(("loss", "step"), [(4.0, 20.0), (4.25, 17.5), (9.0, 10.0), (3.4999, None)])
def test_step_at_loss(loss, step):
    rising_again = [5.0, 4.0, 3.5, 5.0, 3.5]  # the first time counts
    found = step_at_loss([10, 20, 30, 40, 50], rising_again, loss)
    assert found == (step if step is None else pytest.approx(step))


def suite(path):
    (made,) = frame.suites(frame.read([path]))
    return made


def test_steps_that_were_made_in_turn_are_pairs(path):
    """A machine that was slow for two of three steps: for the first of them both runs, for the last one of them."""
    synthetic_rows.throughput(path, pairs=1, shares=(), interleaved=True)
    plain, stopped = rows.read(path)
    own = [plain | {"values": [1.0, 4.0, 4.0], "name": ""}, stopped | {"values": [1.1, 4.4, 9.9], "name": ""}]
    assert frame.costs(own).frame.loc["stopped 10%", "step_time"].value == pytest.approx(1.1)


def test_rows_of_a_suite_in_any_state(path):
    """Runs that tuned and a method that diverged are not in the frame; each other has the seeds that it has."""
    synthetic_rows.converge(path, seeds=1, methods={"rkd@0.1": 1.0}, role="tuning")
    assert frame.gains(frame.read([path])) is None
    synthetic_rows.converge(path, seeds=2, methods={"rkd_l@1": 1.5})
    assert frame.gains(frame.read([path])) is None  # nothing to compare with
    synthetic_rows.converge(path, seeds=2, methods={"standard": 1.0})
    synthetic_rows.converge(path, seeds=1, methods={"let@1": 2.0, "wild@9": 1.0})
    synthetic_rows.append(path, rows.DIVERGED, [7], 1, label="wild@9", role="result", suite="c")
    made = suite(path)
    assert made.diverged == {"wild@9": [1]}
    assert {label: loss.num for label, loss in made.frame["loss"].items()} == {"standard": 2, "rkd_l@1": 2, "let@1": 1}
    compared = [(label, other, difference.num) for label, other, difference in made.comparisons]
    assert compared == [("rkd_l@1", "standard", 2), ("let@1", "standard", 1), ("let@1", "rkd_l@1", 1)]


def test_curves_have_the_mean_over_seeds_and_its_interval(path):
    synthetic_rows.converge(path)
    curves = frame.curves(suite(path)).set_index(["label", "step"])
    losses = [row["curve"]["test_loss"][4] for row in rows.read(path) if row["label"] == "let@1"]
    at_50 = curves.loc["let@1", 50]
    assert at_50["loss"] == pytest.approx(sum(losses) / 5) and at_50["low"] < at_50["loss"] < at_50["high"]
    assert (at_50["tokens"], at_50["flops"], at_50["seconds"]) == (50_000, pytest.approx(3.3e11), pytest.approx(110))


def test_mistakes(path, tmp_path):
    path.touch()
    with pytest.raises(ConfigError, match=r"no complete pair of throughput runs .* \(no rows at all\)"):
        frame.suites(frame.read([path]))
    with pytest.raises(ConfigError, match="no such file"):
        frame.read([path, tmp_path / "no.jsonl"])
