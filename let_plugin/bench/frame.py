"""Rows as pandas frames. Each number of a table, a page or a figure is derived here, once.

Estimates are of paired measurements: made in turn on one machine, or with one seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import pandas as pd

from let_plugin.bench import rows
from let_plugin.bench.rows import BASELINE, CHOICE, CONTROLS, CONVERGE, DISTILLATION, DIVERGED, PROFILE, THROUGHPUT, Row
from let_plugin.config.errors import ConfigError, Problem, raise_if_any

AXES = ("tokens", "flops", "seconds")  # what a curve may be drawn against
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and Student's 95 % confidence interval. The interval is None for fewer than two values."""

    value: float
    low: float | None
    high: float | None
    num: int

    def text(self, form: str, unit: str = "") -> str:
        """The value with a unit, and its interval, each in the format `form`."""
        interval = "" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{unit}{interval}"


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values, one per seed for example. ValueError if there are none."""
    from scipy import stats

    num, center = len(values), fmean(values)
    if num == 1:
        return Estimate(center, None, None, num)
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, num - 1))
    return Estimate(center, center - half, center + half, num)


def ratio(values: Sequence[float], baselines: Sequence[float]) -> Estimate:
    """The geometric mean of values / baselines over pairs: the interval is that of the mean logarithm.

    The inverse ratio has the inverse estimate. ValueError if they are not pairs, or a value is not positive.
    """
    logs = mean([math.log(value / baseline) for value, baseline in zip(values, baselines, strict=True)])
    low, high = (None if log is None else math.exp(log) for log in (logs.low, logs.high))
    return Estimate(math.exp(logs.value), low, high, logs.num)


def step_at_loss(steps: Sequence[float], losses: Sequence[float], loss: float) -> float | None:
    """The step at which a curve first reached `loss`, linearly between its points; None if it never did."""
    reached = np.flatnonzero((ys := np.asarray(losses)) <= loss)
    if not len(reached):
        return None
    around = [reached[0], max(reached[0] - 1, 0)]
    return float(np.interp(loss, ys[around], np.asarray(steps)[around]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """What may be compared with each other."""

    kind: str  # THROUGHPUT or CONVERGE
    frame: pd.DataFrame  # a line per label: see `costs` and `gains`
    rows: Sequence[Row]  # what the frame is made of
    profiles: Sequence[Row] = ()
    choices: Sequence[Row] = ()  # of weights, the latest of each method
    # Label -> seeds that diverged. Such a label is not in the frame: the other seeds would flatter it.
    diverged: Mapping[str, Sequence[int]] = field(default_factory=dict)
    # Label, the label it is compared with, and the difference of their final losses.
    comparisons: Sequence[tuple[str, str, Estimate]] = ()

    @property
    def name(self) -> str:
        """The question that it answers: the rows' own `name`, or that of their file."""
        return self.rows[0]["name"]


def read(files: Sequence[Path]) -> list[Row]:
    """The rows of the files, each with a `name`: its own or its file's. ConfigError lists what is no file or row."""
    raise_if_any(Problem("ROWS.jsonl", "no such file", str(file)) for file in files if not file.is_file())
    return [{"name": file.stem.replace("_", " "), **row} for file in dict.fromkeys(files) for row in rows.read(file)]


def suites(found: Sequence[Row]) -> list[Suite]:
    """In the order of their rows. ConfigError if there is nothing to compare in any of them."""
    made: list[Suite] = []
    for suite in dict.fromkeys(row["suite"] for row in found if "suite" in row):
        own = [row for row in found if row.get("suite") == suite]
        made += [one for one in (costs(own), gains(own)) if one is not None]
    if not made:
        kinds = ", ".join(sorted({row["kind"] for row in found})) or "no rows at all"
        message = f"no complete pair of throughput runs and no results of a convergence suite in the rows ({kinds})"
        raise ConfigError(Problem("ROWS.jsonl", message))
    return made


def costs(own: Sequence[Row]) -> Suite | None:
    """A suite's throughput rows, complete rounds only: a line per label. Bytes, seconds per step, ratios to plain."""
    rounds = _complete([row for row in own if row["kind"] == THROUGHPUT])
    lines = []
    for label, measured in rounds.items():
        first = measured[0]
        plain = rounds[first["baseline"]]
        ratios = [_step_time_ratio(row, base) for row, base in zip(measured, plain, strict=True)]
        step_time, steps = ratio(ratios, [1.0] * len(ratios)), first["run_steps"]
        # As in the preflight report, which imports torchtitan: a table shall not wait for that. None: it never pays.
        affordable_steps = steps - (step_time.value - 1) * first["stop_step"]
        peaks, base = (pd.DataFrame([row["peak_memory_bytes"] for row in some]) for some in (measured, plain))
        kind = peaks.columns[0]  # what a bound is compared with
        line = {
            "label": label,
            "case": first["case"],
            "is_baseline": label == first["baseline"],
            "share": (first["num_teacher_params"] or 0) / first["num_student_params"],
            "tokens_per_second": median([row["tokens_per_second"] for row in measured]),
            "seconds": median([median(row["values"]) for row in measured]),
            "ratios": ratios,
            "step_time": step_time,
            "flop_bound": 1 + first["flop_bound"],
            "memory_bound": first["memory_bound_bytes"],
            "memory_kind": kind,
            "more_memory": peaks[kind].median() - base[kind].median(),
            "memory_bound_ratio": 1 + first["memory_bound_bytes"] / base[kind].median(),
            "break_even": steps / affordable_steps if affordable_steps > 0 else None,
        }
        for name in peaks:
            line |= {name: peaks[name].median(), f"{name} / plain": ratio(peaks[name], base[name])}
        lines.append(line)
    if not lines:
        return None
    used = [row for measured in rounds.values() for row in measured]
    profiles = [row for row in own if row["kind"] == PROFILE]
    return Suite(kind=THROUGHPUT, frame=pd.DataFrame(lines).set_index("label"), rows=used, profiles=profiles)


def gains(own: Sequence[Row]) -> Suite | None:
    """A suite's convergence rows: a line per label, over the seeds that BASELINE has too. Losses in nats per token.

    A speed-up is BASELINE's cost of its final loss over the method's cost of the same, each where the curve of that
    seed is first there. It is None if a seed never gets there: a mean over the others would flatter the method.
    """
    ended = [row for row in own if row.get("role") == "result"]
    diverged: dict[str, list[int]] = {}
    for row in (row for row in ended if row["kind"] == DIVERGED):
        diverged.setdefault(row["label"], []).append(row["seed"])
    results = {(row["label"], row["seed"]): row for row in ended if row["label"] not in diverged}
    plain = {seed: row for (label, seed), row in results.items() if label == BASELINE}
    paired = [(row, plain[seed]) for (_, seed), row in results.items() if seed in plain]
    if not paired:
        return None
    kinds = {row["label"]: (row["method"], row["weight"]) for row in [*plain.values(), *(row for row, _ in paired)]}
    losses = pd.Series({key: row["final_test_loss"] for key, row in results.items()}).unstack(0)
    lines = []
    for label in kinds:
        pairs = [pair for pair in paired if pair[0]["label"] == label]
        runs = [row for row, _ in pairs]
        line = {"label": label, "loss": mean([row["final_test_loss"] for row in runs])}
        line |= {"preparation": runs[0]["preparation"], "difference": _less(losses, label, BASELINE)}
        for axis in AXES:
            reached = [
                [step_at_loss(c[axis], c["test_loss"], base["final_test_loss"]) for c in (base["curve"], run["curve"])]
                for run, base in pairs
            ]
            missed = sum(own is None for _, own in reached)
            speed_up = None if missed else ratio(*zip(*reached, strict=True))
            line |= {f"{axis}_missed": missed, f"{axis}_ratio": speed_up}
            line[axis] = fmean(row["curve"][axis][-1] for row in runs)
        kind = list(runs[0]["peak_memory_bytes"])[-1]  # what an accelerator's allocator holds, not what it gave out
        lines.append(line | {"memory_kind": kind, "memory": fmean(row["peak_memory_bytes"][kind] for row in runs)})
    compared = [(label, o) for label in kinds for o in kinds if label != o and _says(kinds[o], of=kinds[label])]
    return Suite(
        kind=CONVERGE,
        frame=pd.DataFrame(lines).set_index("label"),
        rows=[row for row, _ in paired],
        choices=list({row["method"]: row for row in own if row["kind"] == CHOICE}.values()),
        diverged=diverged,
        comparisons=[(*pair, known) for pair in compared if (known := _less(losses, *pair))],
    )


def curves(suite: Suite) -> pd.DataFrame:
    """Of a convergence suite: label, step, mean costs, mean test loss and its interval, at each evaluation."""
    lines = []
    for label in suite.frame.index:
        runs = [pd.DataFrame(row["curve"]).set_index("step") for row in suite.rows if row["label"] == label]
        for step, at_step in pd.concat(runs).groupby(level=0):
            loss, paid = mean(at_step["test_loss"]), at_step[list(AXES)].mean()
            own = {"loss": loss.value, "low": loss.low, "high": loss.high}
            lines.append({"label": label, "step": step, **paid, **own})
    return pd.DataFrame(lines)


def slope(suite: Suite) -> Estimate | None:
    """How the overhead of a throughput suite grows with N_T / N_S: the mean over rounds of least-squares slopes.

    Rounds are what is independent: what is measured in one has its noise in common. None for fewer than three sizes.
    """
    from scipy import stats

    active = suite.frame[suite.frame["case"] == "active"]
    if active["share"].nunique() < 3 or active["share"].duplicated().any():
        return None
    return mean([stats.linregress(active["share"], ys).slope for ys in zip(*active["ratios"], strict=True)])


def _less(losses: pd.DataFrame, label: str, other: str) -> Estimate | None:
    """The mean difference over the seeds that both have; None if there is none."""
    both = (losses[label] - losses[other]).dropna()
    return mean(both.tolist()) if len(both) else None


def _says(other: tuple[str, float | None], *, of: tuple[str, float | None]) -> bool:
    """Whether a method, at its weight, is compared with another one."""
    if other[0] in CONTROLS:  # they say something about LET at their own weight only
        return of == ("let", other[1])
    return of[0] != BASELINE and (other[0] == BASELINE or (other[0].startswith(DISTILLATION) and of[0] not in CONTROLS))


def _complete(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Label -> its rows, one for each round that all labels have: the n-th of each are a pair."""
    by_label: dict[str, dict[int, Row]] = {}
    for row in found:
        by_label.setdefault(row["label"], {})[row["pair"]] = row
    complete = [key for key in next(iter(by_label.values()), ()) if all(key in own for own in by_label.values())]
    return {label: [own[key] for key in complete] for label, own in by_label.items()} if complete else {}


def _step_time_ratio(row: Row, plain: Row) -> float:
    """The ratio of the median steps. Steps that were made in turn are pairs, and it is the median of their ratios."""
    if row.get("interleaved") and plain.get("interleaved"):
        return median([own / base for own, base in zip(row["values"], plain["values"], strict=True)])
    return median(row["values"]) / median(plain["values"])
