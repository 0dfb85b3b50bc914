"""Runs of a convergence suite as rows: what the suite writes (`Run.details`), and what the report reads (`read`).

A row of kind "converge" is one run to its end: one method with one seed. Runs of a suite share data order by seed, so
that runs of one seed make pairs.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from let_plugin.errors import ConfigError, Problem

KIND = "converge"
BASELINE = "standard"

Loss = Literal["test_loss", "validation_loss"]
Axis = Literal["tokens", "flops", "seconds"]


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
        method: Its name in the report; other settings are another method ("LET 0.1"). "standard" is the baseline.
        seed: Of the run; None if it was not fixed, and then it makes no pair.
        suite: What may be compared: the same data, student, code and device.
        curve: Evaluations in order of their steps.
        peak_memory_bytes: Kind of memory -> largest peak of a rank, as in throughput rows.
        final: "validation_loss" and "test_loss" after the last step.
    """

    method: str
    seed: int | None
    suite: str
    curve: tuple[Point, ...]
    peak_memory_bytes: Mapping[str, int]
    final: Mapping[str, float]

    def details(self) -> dict[str, Any]:
        """What the run's row has besides `rows.row`'s own fields (of which the seed is one)."""
        fields = asdict(self)
        del fields["seed"]
        return fields | {"curve": [asdict(point) for point in self.curve], "final": dict(self.final)}

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

    if not isinstance(row.get("method"), str) or not row["method"]:
        wrong("method", "expected a name")
    points = []
    curve = row.get("curve")
    if not isinstance(curve, list) or not curve:
        wrong("curve", "expected a list of evaluations, at least one")
        curve = []
    for number, entry in enumerate(curve):
        missing = [name for name in ("step", "tokens", "flops", "seconds") if not _is_number(_get(entry, name))]
        losses = {name: _get(entry, name) for name in ("validation_loss", "test_loss")}
        missing += [name for name, value in losses.items() if value is not None and not _is_number(value)]
        if missing:
            wrong(f"curve[{number}]", f"expected a finite number for {', '.join(missing)}")
            continue
        costs = {name: entry[name] for name in ("step", "tokens", "flops", "seconds")}
        points.append(Point(**costs, **losses))
    if any(later.step <= earlier.step for earlier, later in pairwise(points)):
        wrong("curve", "expected rising steps")
    final = row.get("final", {})
    if not isinstance(final, Mapping) or not all(map(_is_number, final.values())):
        wrong("final", "expected finite losses by name")
    peak = row.get("peak_memory_bytes", {})
    if _is_number(peak):
        peak = {"peak": peak}
    if not isinstance(peak, Mapping) or not all(map(_is_number, peak.values())):
        wrong("peak_memory_bytes", "expected bytes by kind of memory")
    if problems:
        raise ConfigError(problems)
    suite = str(row.get("suite", ""))
    return Run(
        method=row["method"],
        seed=row["seed"],
        suite=suite,
        curve=tuple(points),
        peak_memory_bytes=dict(peak),
        final=dict(final),
    )


def _get(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, Mapping) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
