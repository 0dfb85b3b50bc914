"""What a page is made of, and how it writes numbers. Values are text here; the template escapes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from let_plugin.bench.rows import Row
from let_plugin.bench.statistics import CONFIDENCE, Estimate

# "worse" and "better" are resolved differences; "open" is one that the interval does not resolve.
Verdict = Literal["better", "worse", "open", "note"]

_BINARY = (("GiB", 2**30), ("MiB", 2**20))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence of the summary."""

    text: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Table:
    """The first column names the line.

    Attributes:
        caption: What it shows, of which runs.
        header: A name per column.
        lines: Cells; as many as the header has.
        notes: What the columns mean.
    """

    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing.

    Attributes:
        name: Of its PNG file, without the ending.
        title: What it shows.
        caption: How to read it, and of which runs it is.
        description: What can be seen in it, in words, for who cannot see it.
        svg: For the page: in its colours, light or dark.
        png: For elsewhere: on white.
    """

    name: str
    title: str
    caption: str
    description: str
    svg: str
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Section:
    """A suite: what is compared with each other.

    Attributes:
        anchor: Its id on the page.
        title: Its heading.
        origin: Of which runs it is.
        findings: Plain language.
        figures: In order.
        tables: In order.
        rows: All rows that it is made of.
    """

    anchor: str
    title: str
    origin: str
    findings: Sequence[Finding] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    rows: Sequence[Row] = field(default=(), repr=False)


def origin(found: Sequence[Row], noun: str = "run") -> str:
    """How many runs, on which device, of which commit."""
    devices = _unique(
        f"{row['device_name']} ({row['device']})" if row.get("device_name") else row["device"] for row in found
    )
    commits = _unique(
        "no commit (an installed package)"
        if row["commit"] is None
        else f"commit {row['commit']}{' with uncommitted changes' if row['dirty'] else ''}"
        for row in found
    )
    return f"{plural(len(found), noun)} on {'; '.join(devices)}; {', '.join(commits)}."


def number_of_comparisons(number: int) -> Finding:
    """What is to be kept in mind where many things are compared."""
    return Finding(
        text=f"{number} comparisons at {CONFIDENCE:.0%} each, not corrected for their number: with no effect at all, "
        f"{(1 - CONFIDENCE) * number:.1f} of them would be expected to look significant.",
        verdict="note",
    )


def plural(count: int, noun: str, many: str = "") -> str:
    return f"{count} {noun if count == 1 else many or f'{noun}s'}"


def interval(estimate: Estimate, form: str = ".3f") -> str:
    """A value and its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}} (no interval)"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def percent(ratio: Estimate) -> str:
    """What a ratio is more or less than one, in percent, and its interval in words."""
    text = f"{ratio.value - 1:+.2%}"
    if ratio.low is None or ratio.high is None:
        return f"{text}, one pair, no interval"
    return f"{text}, {CONFIDENCE:.0%} interval {ratio.low - 1:+.2%} to {ratio.high - 1:+.2%}"


def is_resolved(estimate: Estimate, null: float) -> bool:
    """Whether there is an interval, and the value of "no difference" is outside of it."""
    return estimate.low is not None and not estimate.contains(null)


def memory(num_bytes: float, *, sign: str = "") -> str:
    unit, size = next((pair for pair in _BINARY if abs(num_bytes) >= 10 * pair[1]), _BINARY[-1])
    return f"{num_bytes / size:{sign},.1f} {unit}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(values))
