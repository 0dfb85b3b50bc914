"""From throughput rows to a table for the console. Every number in it comes from the rows."""

from collections.abc import Sequence
from pathlib import Path

from let_plugin.bench import rows
from let_plugin.bench.rows import Row
from let_plugin.bench.statistics import Estimate, median, paired_ratio
from let_plugin.bench.throughput.suite import complete_rounds
from let_plugin.preflight.report import break_even

_MIB = 2**20
FLOP_BOUND = "FLOP bound: 1 + N_T / (3 N_S), in distillation with the teacher's head and the student's once more"


def table(path: Path, suite: str) -> str:
    """The suite's results in `path`, as text: a table, the profiles, and what the columns mean."""
    found = [row for row in rows.read(path) if row.get("suite") == suite]
    measured = by_label(found, suite)
    num_pairs = len(next(iter(measured.values())))
    first = found[0]
    kinds = list(first["peak_memory_bytes"])
    header = ["case", "tokens/s", "ms/step", "step time / plain", "FLOP bound"]
    for kind in kinds:
        header += [f"{kind} MiB", f"{kind} / plain"]
    header += ["+ MiB", "bound + MiB", "break-even"]
    body = [_line(own, measured[own[0]["baseline"]], kinds) for own in measured.values()]
    how = f"{first['num_processes']} process{'es' if first['num_processes'] > 1 else ''}"
    how += ", steps in turn" if first.get("interleaved") else ""
    notes = [
        f"{num_pairs} pairs on {first['device_name']} ({first['device']}), {how}; medians, and the mean ratio to plain "
        "with its 95 % interval.",
        f"{FLOP_BOUND}. Memory bound: the teacher's parameters per rank + one activation.",
        f"Break-even: so many times fewer steps pay for a teacher that stays {first['stop_step']} of "
        f"{first['run_steps']} steps (in distillation: all of them).",
    ]
    if not first["peak_is_of_measured_steps"]:
        notes.append("This kernel does not let a peak start anew: memory is that of whole runs, also after the stop.")
    profiles = [_profile(row) for row in found if row["kind"] == "profile"]
    return "\n\n".join(["\n".join(aligned([header, *body])), "\n".join(notes), *profiles])


def by_label(found: Sequence[Row], suite: str) -> dict[str, list[Row]]:
    """Label -> the suite's rows out of complete rounds, in their order: the n-th of each label make a pair."""
    by_label: dict[str, list[Row]] = {}
    for row in found:
        if row["kind"] == "throughput" and row.get("suite") == suite:
            by_label.setdefault(row["label"], []).append(row)
    complete = complete_rounds(found, suite, list(by_label))
    return {
        label: sorted((row for row in own if row["pair"] in complete), key=lambda row: row["pair"])
        for label, own in by_label.items()
    }


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The cells of each line padded to columns, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def step_time_ratio(own: Sequence[Row], plain: Sequence[Row]) -> Estimate:
    """Step time of a case, in multiples of the plain one's, paired by round: the mean of `round_ratios`."""
    ratios = round_ratios(own, plain)
    return paired_ratio(ratios, [1.0] * len(ratios))


def round_ratios(own: Sequence[Row], plain: Sequence[Row]) -> list[float]:
    """Of each round, the step time in multiples of the plain one's.

    That is the ratio of the two runs' median steps. Where the steps were made in turn they are pairs themselves, and it
    is the median of their ratios, which what has come and gone within the round does not disturb.
    """
    ratios = []
    for row, base in zip(own, plain, strict=True):
        if row.get("interleaved") and base.get("interleaved"):
            ratios.append(median([a / b for a, b in zip(row["values"], base["values"], strict=True)]))
        else:
            ratios.append(median(row["values"]) / median(base["values"]))
    return ratios


def memory_ratio(own: Sequence[Row], plain: Sequence[Row], kind: str) -> Estimate:
    """Peak memory of a case, in multiples of the plain one's, paired by round."""
    peaks, plain_peaks = ([row["peak_memory_bytes"][kind] for row in some] for some in (own, plain))
    return paired_ratio(peaks, plain_peaks)


def _line(own: Sequence[Row], plain: Sequence[Row], kinds: Sequence[str]) -> list[str]:
    row = own[0]
    is_baseline = row["label"] == row["baseline"]
    time = step_time_ratio(own, plain)
    cells = [
        row["label"],
        f"{median([r['tokens_per_second'] for r in own]):,.0f}",
        f"{1000 * median([median(r['values']) for r in own]):,.1f}",
        "1" if is_baseline else _estimate(time),
        "" if is_baseline else f"{1 + row['flop_bound']:.4f}",
    ]
    for kind in kinds:
        cells.append(f"{_peak(own, kind):,.1f}")
        cells.append("1" if is_baseline else _estimate(memory_ratio(own, plain, kind)))
    if is_baseline:
        return [*cells, "", "", ""]
    speed_up = break_even(row["run_steps"], row["stop_step"], time.value - 1)
    return [
        *cells,
        f"{_peak(own, kinds[0]) - _peak(plain, kinds[0]):+,.1f}",
        f"{row['memory_bound_bytes'] / _MIB:+,.1f}",
        "" if not row["flop_bound"] else "never" if speed_up is None else f"{speed_up:.3f}x",
    ]


def _peak(own: Sequence[Row], kind: str) -> float:
    return median([row["peak_memory_bytes"][kind] for row in own]) / _MIB


def _estimate(estimate: Estimate) -> str:
    interval = "" if estimate.low is None else f" [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{estimate.value:.4f}{interval}"


def _profile(row: Row) -> str:
    step = median(row["values"])
    parts = [[name, f"{1000 * seconds:,.2f}", f"{seconds / step:.2%}"] for name, seconds in row["parts"].items()]
    rest = step - sum(row["parts"].values())
    parts.append(["the student's own step", f"{1000 * rest:,.2f}", f"{rest / step:.2%}"])
    bound = f"FLOP bound of LET {row['flop_bound']:.2%} of plain"
    heading = f"{row['label']}, profiled ({1000 * step:,.1f} ms/step; {bound}):"
    return "\n".join([heading, *aligned([["part", "ms/step", "of the step"], *parts])])
