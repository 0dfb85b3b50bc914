"""Runs of a convergence suite as rows: what the suite writes (`Run.details`), and what the report reads (`read`).

A row of kind "converge" is one run to its end: one method with one seed. Runs of a suite share data order by seed, so
that runs of one seed make pairs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from let_plugin.config.errors import ConfigError, Problem

KIND = "converge"
CHOICE = "converge_choice"  # of a weight
DIVERGED = "converge_diverged"  # a run whose held-out loss was no number any more; its value is the step
BASELINE = "standard"

Loss = Literal["test_loss", "validation_loss"]
Axis = Literal["tokens", "flops", "seconds"]

_LOSSES: tuple[Loss, ...] = ("validation_loss", "test_loss")


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation. Costs are cumulative, and include what the method had to prepare (features, scores, models).

    Attributes:
        step: Optimizer steps taken.
        tokens: Training tokens seen, of the whole job.
        flops: Floating-point operations, estimated: student, teacher and preparation.
        seconds: Wall-clock time without the evaluations.
        validation_loss: Nats per token on the split that settings are chosen on; None if it was not evaluated.
        test_loss: Nats per token on the split that results are read on; None if it was not evaluated.
    """

    step: int
    tokens: int
    flops: float
    seconds: float
    validation_loss: float | None = None
    test_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method with one seed, run to its end.

    Attributes:
        method: Its name in the report (a row's `label`, or else its `method`); other settings are another one
            ("let@0.1"). "standard" is the baseline.
        seed: Of the run; None if it was not fixed, and then it makes no pair.
        suite: What may be compared: the same data, student, code and device.
        curve: Evaluations in order of their steps.
        peak_memory_bytes: Kind of memory -> largest peak of a rank, as in throughput rows.
        final: "validation_loss" and "test_loss" after the last step.
        role: "result", or "tuning" for a run that a setting was chosen by.
    """

    method: str
    seed: int | None
    suite: str
    curve: tuple[Point, ...]
    peak_memory_bytes: Mapping[str, int]
    final: Mapping[str, float]
    role: str = "result"

    def details(self) -> dict[str, Any]:
        """What the run's row has besides `rows.row`'s own fields (of which the seed is one)."""
        return {
            "suite": self.suite,
            "role": self.role,
            "label": self.method,
            "method": self.method,
            "curve": {field.name: [getattr(point, field.name) for point in self.curve] for field in fields(Point)},
            "peak_memory_bytes": dict(self.peak_memory_bytes),
            **{f"final_{name}": value for name, value in self.final.items()},
        }

    def losses(self, loss: Loss, axis: Axis) -> list[tuple[float, float]]:
        """(cost, loss) of the evaluations that have this loss."""
        points = [(float(getattr(point, axis)), getattr(point, loss)) for point in self.curve]
        return [(cost, value) for cost, value in points if value is not None]

    @property
    def peak(self) -> float | None:
        """Bytes that the run needed: reserved by the allocator, or resident. None if it was not measured."""
        return float(max(self.peak_memory_bytes.values())) if self.peak_memory_bytes else None


def read(row: Mapping[str, Any]) -> Run:
    """The run of a row. ConfigError lists the fields that are missing or not what they should be."""
    where = f"converge row of {row['time']}"
    problems = []

    def wrong(field: str, message: str) -> None:
        problems.append(Problem(f"{where}: {field}", message))

    method = row.get("label") or row.get("method")
    if not isinstance(method, str):
        wrong("method", "expected a name")
    points = []
    entries = _entries(row.get("curve"))
    if not entries:
        wrong("curve", "expected evaluations, at least one: columns of one length, or a list")
    for number, entry in enumerate(entries):
        missing = [name for name in ("step", "tokens", "flops", "seconds") if not _is_number(_get(entry, name))]
        losses = {name: _get(entry, name) for name in _LOSSES}
        missing += [name for name, value in losses.items() if value is not None and not _is_number(value)]
        if missing:
            wrong(f"curve[{number}]", f"expected a finite number for {', '.join(missing)}")
            continue
        costs = {name: entry[name] for name in ("step", "tokens", "flops", "seconds")}
        points.append(Point(**costs, **losses))
    if any(later.step <= earlier.step for earlier, later in pairwise(points)):
        wrong("curve", "expected rising steps")
    final: dict[str, float] = {name: row[f"final_{name}"] for name in _LOSSES if row.get(f"final_{name}") is not None}
    for name, value in final.items():
        if not _is_number(value):
            wrong(f"final_{name}", "expected a finite number")
    peak = row.get("peak_memory_bytes", {})
    if _is_number(peak):
        peak = {"peak": peak}
    if not isinstance(peak, Mapping) or not all(map(_is_number, peak.values())):
        wrong("peak_memory_bytes", "expected bytes by kind of memory")
    if problems:
        raise ConfigError(problems)
    return Run(
        method=str(method),
        seed=row["seed"],
        suite=str(row.get("suite", "")),
        role=str(row.get("role", "result")),
        curve=tuple(points),
        peak_memory_bytes=dict(peak),
        final=final,
    )


def diverged_seeds(found: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Label -> seeds of its results that have diverged. Such a one has no result: the other seeds would flatter it."""
    seeds: dict[str, list[int]] = {}
    for row in found:
        if row["kind"] == DIVERGED and row["role"] == "result":
            seeds.setdefault(row["label"], []).append(row["seed"])
    return seeds


def _entries(curve: Any) -> list[Any]:
    """One entry per evaluation, of columns (field -> values) or of a list of evaluations; none for anything else."""
    if isinstance(curve, Mapping):
        columns = list(curve.values())
        if not columns or not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            return []
        return [dict(zip(curve, values, strict=True)) for values in zip(*columns, strict=True)]
    return list(curve) if isinstance(curve, list) else []


def _get(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, Mapping) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
