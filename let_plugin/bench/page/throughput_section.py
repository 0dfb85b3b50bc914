"""Throughput rows on the page: what LET costs in time and memory, beside the bounds, and what that depends on."""

from collections.abc import Callable, Sequence

from let_plugin.bench import summary
from let_plugin.bench.page import figures
from let_plugin.bench.page.figures import Mark, Series
from let_plugin.bench.page.parts import (
    Figure,
    Finding,
    Row,
    Section,
    Table,
    Verdict,
    interval,
    is_resolved,
    memory,
    number_of_comparisons,
    origin,
    percent,
    plural,
)
from let_plugin.bench.statistics import Estimate, Line, median, regression
from let_plugin.preflight.report import break_even

KINDS = ("throughput", "profile")

# Label -> its rows, the n-th of each label from the same round.
Measured = dict[str, list[Row]]


def sections(found: Sequence[Row]) -> list[Section]:
    """A section per suite that has a complete round."""
    suites = dict.fromkeys(row["suite"] for row in found if row["kind"] == "throughput")
    made: list[Section] = []
    for suite in suites:
        measured = summary.by_label(found, suite)
        if all(measured.values()):
            profiles = [row for row in found if row["kind"] == "profile" and row["suite"] == suite]
            made.append(_section(f"throughput-{len(made) + 1}", measured, profiles))
    return made


def _section(anchor: str, measured: Measured, profiles: Sequence[Row]) -> Section:
    used = [row for own in measured.values() for row in own]
    first = used[0]
    where = origin(used)
    kinds = list(first["peak_memory_bytes"])
    others = {label: own for label, own in measured.items() if label != own[0]["baseline"]}
    times = {label: summary.step_time_ratio(own, measured[own[0]["baseline"]]) for label, own in others.items()}
    memories = {
        label: summary.memory_ratio(own, measured[own[0]["baseline"]], kinds[0]) for label, own in others.items()
    }
    fits = _regressions(anchor, measured, where)
    drawn = [_times(anchor, others, times, where), _memories(anchor, measured, others, memories, kinds[0], where)]
    if not others:
        drawn = []
    num_pairs = len(next(iter(measured.values())))
    return Section(
        anchor=anchor,
        title=f"What it costs: {first['device_name']}, {plural(first['num_processes'], 'process', 'processes')}",
        origin=f"{where} {plural(num_pairs, 'pair')} per case.",
        findings=[
            *[_time_finding(own[0], times[label]) for label, own in others.items()],
            *[_memory_finding(own[0], memories[label], kinds[0]) for label, own in others.items()],
            *[finding for _, finding in fits],
            *([number_of_comparisons(2 * len(others) + len(fits))] if others else []),
        ],
        figures=[*drawn, *[figure for figure, _ in fits]],
        tables=[
            _time_table(measured, times, where),
            _memory_table(measured, kinds, where),
            *[_profile(row) for row in profiles],
        ],
        rows=[*used, *profiles],
    )


def _time_finding(row: Row, ratio: Estimate) -> Finding:
    label = row["label"]
    numbers = f"step time {percent(ratio)}"
    bound = f"; the FLOP bound is {row['flop_bound']:+.2%}" if row["flop_bound"] else ""
    if ratio.low is None:
        return Finding(text=f"{label}: {numbers}{bound}. Nothing can be said about significance.", verdict="note")
    if not is_resolved(ratio, 1):
        return Finding(
            text=f"{label}: no significant difference in speed from plain ({numbers}){bound}.", verdict="open"
        )
    slower = ratio.value > 1
    return Finding(
        text=f"{label}: significantly {'slower' if slower else 'faster'} than plain ({numbers}){bound}.",
        verdict="worse" if slower else "better",
    )


def _memory_finding(row: Row, ratio: Estimate, kind: str) -> Finding:
    label = row["label"]
    numbers = f"{kind} peak {percent(ratio)}"
    if ratio.low is None:
        return Finding(text=f"{label}: {numbers}. Nothing can be said about significance.", verdict="note")
    if not is_resolved(ratio, 1):
        return Finding(text=f"{label}: no significant difference in memory from plain ({numbers}).", verdict="open")
    more = ratio.value > 1
    return Finding(
        text=f"{label}: significantly {'more' if more else 'less'} memory than plain ({numbers}).",
        verdict="worse" if more else "better",
    )


def _times(anchor: str, others: Measured, times: dict[str, Estimate], where: str) -> Figure:
    marks = [
        Mark(name=label, value=e.value, low=e.low, high=e.high, bound=1 + others[label][0]["flop_bound"])
        for label, e in times.items()
    ]
    return figures.intervals(
        f"{anchor}-step-time",
        "Step time, in multiples of plain",
        f"Mean ratio over pairs, with its 95 % interval. An interval that holds 1 is not resolved. {where}",
        "; ".join(f"{mark.name}: {interval(times[mark.name])}, bound {mark.bound:.3f}" for mark in marks),
        marks,
        x_label="step time / plain",
        reference=1,
        bound_name="FLOP bound",
    )


def _memories(
    anchor: str, measured: Measured, others: Measured, ratios: dict[str, Estimate], kind: str, where: str
) -> Figure:
    marks = []
    for label, e in ratios.items():
        row = others[label][0]
        plain = _peak(measured[row["baseline"]], kind)
        marks.append(
            Mark(name=label, value=e.value, low=e.low, high=e.high, bound=1 + row["memory_bound_bytes"] / plain)
        )
    return figures.intervals(
        f"{anchor}-memory",
        f"Peak memory ({kind}), in multiples of plain",
        f"Mean ratio over pairs, with its 95 % interval; the bound: teacher's parameters per rank and one activation. "
        f"{where}",
        "; ".join(f"{mark.name}: {interval(ratios[mark.name])}, bound {mark.bound:.3f}" for mark in marks),
        marks,
        x_label=f"{kind} peak / plain",
        reference=1,
        bound_name="memory bound",
    )


def _time_table(measured: Measured, times: dict[str, Estimate], where: str) -> Table:
    lines = []
    for label, own in measured.items():
        row = own[0]
        ratio = times.get(label)
        cells = [
            label,
            f"{row['local_batch_size']}",
            f"{row['seq_len']:,}",
            f"{median([r['tokens_per_second'] for r in own]):,.0f}",
            f"{1000 * median([median(r['values']) for r in own]):,.1f}",
        ]
        if ratio is None:
            lines.append([*cells, "1", "", "", ""])
            continue
        tokens = Estimate(1 / ratio.value, ratio.high and 1 / ratio.high, ratio.low and 1 / ratio.low, ratio.num_pairs)
        speed_up = break_even(row["run_steps"], row["stop_step"], ratio.value - 1)
        paid = "" if not row["flop_bound"] else "never" if speed_up is None else f"{speed_up:.3f}x"
        lines.append([*cells, interval(ratio, ".4f"), interval(tokens, ".4f"), f"{1 + row['flop_bound']:.4f}", paid])
    header = ["case", "batch", "length", "tokens/s", "ms/step"]
    return Table(
        caption="Time",
        header=[*header, "step time / plain", "tokens/s / plain", "FLOP bound", "break-even"],
        lines=lines,
        notes=[
            f"Medians, and mean ratios of step time to plain with their 95 % intervals. {summary.FLOP_BOUND}. "
            "Break-even: so many times fewer steps pay for the teacher, with the configuration's own steps and stop.",
            where,
        ],
    )


def _memory_table(measured: Measured, kinds: Sequence[str], where: str) -> Table:
    lines = []
    for label, own in measured.items():
        row = own[0]
        plain = measured[row["baseline"]]
        cells = [label]
        for kind in kinds:
            ratio = "1" if label == row["baseline"] else interval(summary.memory_ratio(own, plain, kind), ".4f")
            cells += [memory(_peak(own, kind)), ratio]
        more = _peak(own, kinds[0]) - _peak(plain, kinds[0])
        extra = ["", ""] if label == row["baseline"] else [memory(more, sign="+"), _bound(row)]
        lines.append([*cells, *extra])
    header = ["case", *[name for kind in kinds for name in (f"{kind} peak", f"{kind} / plain")]]
    notes = ["Of the rank that needs most. Bound: the teacher's parameters per rank and one activation."]
    if not all(row["peak_is_of_measured_steps"] for own in measured.values() for row in own):
        notes.append("This kernel does not let a peak start anew: memory is that of whole runs, also after the stop.")
    return Table(caption="Memory", header=[*header, f"more {kinds[0]}", "bound"], lines=lines, notes=[*notes, where])


def _bound(row: Row) -> str:
    return memory(row["memory_bound_bytes"], sign="+")


def _profile(row: Row) -> Table:
    step = median(row["values"])
    parts = row["parts"] | {"the student's own step": step - sum(row["parts"].values())}
    return Table(
        caption=f"Where the time goes: {row['label']}, profiled",
        header=["part", "ms/step", "of the step"],
        lines=[[name, f"{1000 * seconds:,.2f}", f"{seconds / step:.2%}"] for name, seconds in parts.items()],
        notes=[f"{1000 * step:,.1f} ms per step under the profiler, which takes time itself. {origin([row])}"],
    )


def _peak(own: Sequence[Row], kind: str) -> float:
    return median([row["peak_memory_bytes"][kind] for row in own])


def _share(row: Row) -> float:
    return row["num_teacher_params"] / row["num_student_params"]


def _regressions(anchor: str, measured: Measured, where: str) -> list[tuple[Figure, Finding]]:
    """Overhead of the cases that pay for a teacher, against each size that was varied, the other sizes held."""
    made: list[tuple[Figure, Finding]] = []
    paying = [own for own in measured.values() if own[0]["flop_bound"] and own[0]["num_teacher_params"]]

    def size(row: Row) -> tuple[int, int]:
        return row["local_batch_size"], row["seq_len"]

    def at(row: Row) -> str:
        return f"batch {row['local_batch_size']}, length {row['seq_len']}"

    axes: list[tuple[str, Callable[[Row], float], Callable[[Row], tuple[object, ...]], Callable[[Row], str]]] = [
        ("teacher size", _share, lambda row: (row["case"], *size(row)), lambda row: f"{row['case']}, {at(row)}"),
        (
            "local batch size",
            lambda row: row["local_batch_size"],
            lambda row: (row["case"], _share(row), row["seq_len"]),
            lambda row: f"{row['case']}, teacher {_share(row):.1%}, length {row['seq_len']}",
        ),
        (
            "sequence length",
            lambda row: row["seq_len"],
            lambda row: (row["case"], _share(row), row["local_batch_size"]),
            lambda row: f"{row['case']}, teacher {_share(row):.1%}, batch {row['local_batch_size']}",
        ),
    ]
    for name, x_of, key, title in axes:
        groups: dict[tuple[object, ...], list[list[Row]]] = {}
        for own in paying:
            groups.setdefault(key(own[0]), []).append(own)
        for group in groups.values():
            if len({x_of(own[0]) for own in group}) > 1:
                number = sum(figure.name.startswith(f"{anchor}-{name.replace(' ', '-')}") for figure, _ in made)
                slug = f"{anchor}-{name.replace(' ', '-')}-{number + 1}"
                made.append(_regression(slug, name, title(group[0][0]), x_of, group, measured, where))
    return made


def _regression(
    slug: str,
    name: str,
    of: str,
    x_of: Callable[[Row], float],
    group: Sequence[list[Row]],
    measured: Measured,
    where: str,
) -> tuple[Figure, Finding]:
    import numpy as np

    is_log2 = name != "teacher size"
    group = sorted(group, key=lambda own: x_of(own[0]))
    xs = [float(x_of(own[0])) for own in group]
    num_rounds = len(group[0])
    ratios = [summary.round_ratios(own, measured[own[0]["baseline"]]) for own in group]
    overheads = [[ratio - 1 for ratio in round_] for round_ in zip(*ratios, strict=True)]
    bounds = [own[0]["flop_bound"] for own in group]
    line = regression(list(np.log2(xs)) if is_log2 else xs, overheads)
    ends = np.linspace(0 if not is_log2 else xs[0], xs[-1] * (1 if is_log2 else 1.05), 2)

    def fitted(x: float) -> float:
        return line.intercept.value + line.slope.value * float(np.log2(x) if is_log2 else x)

    points = Series(name="a pair of runs", xs=xs * num_rounds, ys=[value for round_ in overheads for value in round_])
    lines = [
        Series(name="least squares", xs=list(ends), ys=[fitted(x) for x in ends]),
        Series(name="FLOP bound", xs=xs, ys=bounds),
    ]
    numbers = _slope(line, is_log2, float(np.polyfit(xs, bounds, 1)[0]))
    finding = Finding(text=f"{of}: overhead against {name}: {numbers}.", verdict=_verdict(line))
    figure = figures.fits(
        slug,
        f"Overhead against {name}",
        f"{of}: {numbers}. A line per round, of {plural(num_rounds, 'round')}; the interval is over rounds. {where}",
        "; ".join(f"{x:.1%}" if not is_log2 else f"{x:g}" for x in xs)
        + f": mean overhead {'; '.join(f'{value:+.2%}' for value in np.mean(overheads, axis=0))}. {numbers}.",
        [points],
        lines,
        x_label="teacher's size / student's (N_T / N_S)" if not is_log2 else name,
        y_label="more step time than plain",
        is_log2=is_log2,
    )
    return figure, finding


def _verdict(line: Line) -> Verdict:
    return "open" if line.slope.low is not None and not is_resolved(line.slope, 0) else "note"


def _slope(line: Line, is_log2: bool, bound: float) -> str:
    if is_log2:
        text = f"{interval(line.slope, '+.2%')} of a plain step more per doubling"
    else:
        text = f"slope {interval(line.slope)} per N_T / N_S, where the FLOP bound has {bound:.3f}"
    if line.slope.low is None:
        return f"{text}; significance unknown"
    return f"{text}; {'' if is_resolved(line.slope, 0) else 'not '}significant"
