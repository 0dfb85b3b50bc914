"""Convergence rows on the page: held-out loss against what it costs, and speed-ups to the baseline's final loss."""

from collections.abc import Sequence

import numpy as np

from let_plugin.bench.converge import curves
from let_plugin.bench.converge.curves import BASELINE, CHOICE, DIVERGED, Axis, Loss, Run, diverged_seeds
from let_plugin.bench.converge.methods import CONTROLS
from let_plugin.bench.converge.table import diverged_with
from let_plugin.bench.page import figures
from let_plugin.bench.page.figures import Mark, Series
from let_plugin.bench.page.parts import (
    Figure,
    Finding,
    Row,
    Section,
    Table,
    duration,
    interval,
    is_resolved,
    memory,
    number_of_comparisons,
    origin,
    plural,
)
from let_plugin.bench.statistics import Estimate, mean, paired_difference, paired_ratio, step_at_loss
from let_plugin.config.errors import ConfigError, Problem

_LOSSES: dict[Loss, str] = {"test_loss": "test split", "validation_loss": "validation split"}
_COSTS: dict[Axis, str] = {"tokens": "training tokens", "flops": "FLOPs", "seconds": "wall-clock seconds"}
_GRID_POINTS = 60

KINDS = (curves.KIND, CHOICE, DIVERGED)

# Method -> its runs.
Methods = dict[str, list[Run]]


def sections(found: Sequence[Row]) -> list[Section]:
    """A section per suite. ConfigError lists what is wrong with the rows."""
    problems: list[Problem] = []
    choices: dict[str, dict[str, Row]] = {}
    for row in found:
        if row["kind"] == CHOICE:
            choices.setdefault(row["suite"], {})[row["method"]] = row  # the latest
    suites: dict[str, list[tuple[Run, Row]]] = {}
    for row in found:
        if row["kind"] != curves.KIND:
            continue
        try:
            run = curves.read(row)
        except ConfigError as error:
            problems += error.problems
            continue
        if run.role == "result":
            suites.setdefault(run.suite, []).append((run, row))
    if problems:
        raise ConfigError(problems)
    made = []
    for number, (suite, pairs) in enumerate(suites.items(), start=1):
        # A run that was made twice counts once: the later row.
        latest = {(run.method, run.seed) if run.seed is not None else id(run): (run, row) for run, row in pairs}
        diverged = [row for row in found if row["kind"] == DIVERGED and row["suite"] == suite]
        own = [(run, row) for run, row in latest.values() if run.method not in diverged_seeds(diverged)]
        if own:
            made.append(_section(f"convergence-{number}", own, list(choices.get(suite, {}).values()), diverged))
    return made


def _section(anchor: str, pairs: Sequence[tuple[Run, Row]], choices: Sequence[Row], diverged: Sequence[Row]) -> Section:
    rows = [row for _, row in pairs]
    methods: Methods = {}
    for run, _ in pairs:
        methods.setdefault(run.method, []).append(run)
    if BASELINE in methods:
        methods = {BASELINE: methods.pop(BASELINE)} | methods
    loss: Loss = "test_loss" if all(run.losses("test_loss", "tokens") for run, _ in pairs) else "validation_loss"
    where = origin(rows)
    differences = {name: _difference(runs, methods.get(BASELINE, []), loss) for name, runs in methods.items()}
    speed_ups = {name: _speed_ups(runs, methods.get(BASELINE, []), loss) for name, runs in methods.items()}
    drawn = [_curve_figure(anchor, methods, loss, axis, label, where) for axis, label in _COSTS.items()]
    drawn.append(_memory_figure(anchor, methods, loss, where))
    drawn.append(_speed_up_figure(anchor, speed_ups, where))
    num_seeds = len({run.seed for run, _ in pairs})
    return Section(
        anchor=anchor,
        title="What it brings: held-out loss",
        origin=f"{where} {plural(len(methods), 'method')}, {plural(num_seeds, 'seed')}; losses of the {_LOSSES[loss]}.",
        findings=[
            *_findings(methods, differences, speed_ups, loss),
            *(
                Finding(text=f"{label} has no result: {diverged_with(seeds)}.", verdict="note")
                for label, seeds in diverged_seeds(diverged).items()
            ),
        ],
        figures=[figure for figure in drawn if figure is not None],
        tables=[
            _final_table(methods, differences, loss, where),
            _speed_up_table(methods, speed_ups, where),
            *([_choice_table(choices)] if choices else []),
        ],
        rows=[*rows, *choices, *diverged],
    )


def _final(run: Run, loss: Loss) -> float | None:
    points = run.losses(loss, "tokens")
    return run.final.get(loss, points[-1][1] if points else None)


def _paired(runs: Sequence[Run], baselines: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(run, baseline) of the same seed."""
    by_seed = {run.seed: run for run in baselines if run.seed is not None}
    return [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]


def _difference(runs: Sequence[Run], baselines: Sequence[Run], loss: Loss) -> Estimate | None:
    """Of the final losses, in nats; None without pairs."""
    pairs = [(_final(run, loss), _final(baseline, loss)) for run, baseline in _paired(runs, baselines)]
    known = [(own, other) for own, other in pairs if own is not None and other is not None]
    return paired_difference(*zip(*known, strict=True)) if known else None


def _speed_ups(runs: Sequence[Run], baselines: Sequence[Run], loss: Loss) -> dict[Axis, tuple[Estimate | None, int]]:
    """Cost -> (the baseline's cost of its final loss / the runs' cost of the same, in how many pairs it was reached).

    The ratio is None unless every pair reached it: a mean over those that did would flatter the method.
    """
    found: dict[Axis, tuple[Estimate | None, int]] = {}
    for axis in _COSTS:
        own, other = [], []
        pairs = _paired(runs, baselines)
        for run, baseline in pairs:
            final = _final(baseline, loss)
            if final is None:
                continue
            cost, goal = (step_at_loss(each.losses(loss, axis), final) for each in (run, baseline))
            if cost and goal:
                own.append(cost)
                other.append(goal)
        complete = bool(pairs) and len(own) == len(pairs)
        found[axis] = (paired_ratio(other, own) if complete else None, len(own))
    return found


def _findings(
    methods: Methods,
    differences: dict[str, Estimate | None],
    speed_ups: dict[str, dict[Axis, tuple[Estimate | None, int]]],
    loss: Loss,
) -> list[Finding]:
    if BASELINE not in methods:
        return [Finding(text=f"No run of the baseline ({BASELINE}): nothing to compare with.", verdict="note")]
    found = []
    for name, difference in differences.items():
        if name == BASELINE:
            continue
        if difference is None:
            found.append(Finding(text=f"{name}: no seed in common with {BASELINE}; not compared.", verdict="note"))
            continue
        numbers = f"{interval(difference, '+.4f')} nats per token over {plural(difference.num_pairs, 'paired seed')}"
        ratio, num_reached = speed_ups[name]["tokens"]
        if difference.low is None:
            text, verdict = f"{name}: final loss {numbers}. One pair says nothing about significance", "note"
        elif not is_resolved(difference, 0):
            text, verdict = f"{name}: no significant difference in final loss from {BASELINE} ({numbers})", "open"
        else:
            better = difference.value < 0
            text = f"{name}: final loss significantly {'lower' if better else 'higher'} than {BASELINE}'s ({numbers})"
            verdict = "better" if better else "worse"
        if ratio is not None:
            text += f"; it reaches {BASELINE}'s final loss with {interval(ratio, '.2f')} times fewer tokens"
        else:
            text += f"; {BASELINE}'s final loss reached in {num_reached} of {difference.num_pairs} pairs"
        found.append(Finding(text=f"{text}.", verdict=verdict))  # type: ignore[arg-type]
    found += _control_findings(methods, loss)
    num = sum(finding.verdict != "note" for finding in found)  # those of losses: nothing else is called significant
    if num > 1:
        found.append(number_of_comparisons(num))
    if loss == "validation_loss":
        text = (
            "Losses are of the validation split, which settings may have been chosen on: not all rows have a test loss."
        )
        found.append(Finding(text=text, verdict="note"))
    return found


def _control_findings(methods: Methods, loss: Loss) -> list[Finding]:
    """LET beside the controls at its weight: only what they do not have is the teacher's knowledge."""
    found = []
    for name, runs in methods.items():
        kind, _, weight = name.partition("@")
        for control in (f"{each}@{weight}" for each in CONTROLS if kind == "let"):
            difference = _difference(runs, methods.get(control, []), loss)
            if difference is None:
                continue
            numbers = f"({interval(difference, '+.4f')} nats per token)"
            if difference.low is None:
                text, verdict = f"{name} less its control {control} {numbers}: one pair says nothing", "note"
            elif not is_resolved(difference, 0):
                text, verdict = f"{name}: no significant difference from its control {control} {numbers}", "open"
            else:
                how, verdict = ("lower", "better") if difference.value < 0 else ("higher", "worse")
                text = f"{name}: final loss significantly {how} than that of its control {control} {numbers}"
            found.append(Finding(text=f"{text}.", verdict=verdict))  # type: ignore[arg-type]
    return found


def _band(runs: Sequence[Sequence[tuple[float, float]]], name: str, *, is_baseline: bool) -> Series | None:
    """Mean over runs, with its interval, at costs that all of them have reached. None for runs without a curve."""
    if not runs or not all(runs):
        return None
    first, last = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    if last < first:
        return None
    costs = [tuple(cost for cost, _ in run) for run in runs]
    # Evaluations at equal costs are shown as they are; else between evaluations, linearly.
    xs = list(costs[0]) if len(set(costs)) == 1 else list(np.linspace(first, last, _GRID_POINTS))
    values = np.array([np.interp(xs, [cost for cost, _ in run], [value for _, value in run]) for run in runs])
    estimates = [mean(column) for column in values.T]
    return Series(
        name=name,
        xs=xs,
        ys=[e.value for e in estimates],
        lows=[e.low for e in estimates],
        highs=[e.high for e in estimates],
        is_baseline=is_baseline,
    )


def _curve_figure(anchor: str, methods: Methods, loss: Loss, axis: Axis, label: str, where: str) -> Figure | None:
    series = [
        _band([run.losses(loss, axis) for run in runs], name, is_baseline=name == BASELINE)
        for name, runs in methods.items()
    ]
    text = "preparation included" if axis != "tokens" else "seen by the student"
    return _loss_figure(f"{anchor}-{axis}", series, loss, label, f"{label}, {text}", where)


def _memory_figure(anchor: str, methods: Methods, loss: Loss, where: str) -> Figure | None:
    """Tokens times the run's peak memory in multiples of the baseline's: what one token costs where memory is short."""
    peaks = [run.peak for run in methods.get(BASELINE, []) if run.peak is not None]
    if not peaks or any(run.peak is None for runs in methods.values() for run in runs):
        return None
    unit = float(np.mean(peaks))
    series = [
        _band(
            [[(cost * (run.peak or 0) / unit, value) for cost, value in run.losses(loss, "tokens")] for run in runs],
            name,
            is_baseline=name == BASELINE,
        )
        for name, runs in methods.items()
    ]
    label = "tokens, normalised by peak memory"
    return _loss_figure(
        f"{anchor}-memory", series, loss, label, f"tokens x peak memory / {BASELINE}'s mean peak memory", where
    )


def _loss_figure(
    name: str, series: Sequence[Series | None], loss: Loss, title: str, x_label: str, where: str
) -> Figure | None:
    known = [line for line in series if line is not None and len(line.xs) > 1]
    if not known:
        return None
    # Early losses are so much higher that nothing else could be told apart.
    begin = 0.2 * max(line.xs[-1] for line in known)
    shown = [y for line in known for x, y in zip(line.xs, line.ys, strict=True) if x >= begin]
    low, high = min(shown), max(shown)
    top = high + 0.1 * (high - low) if high > low else None
    cut = top is not None and any(max(line.ys) > top for line in known)
    return figures.curves(
        name,
        f"Held-out loss against {title}",
        f"Mean over seeds on the {_LOSSES[loss]}, and its 95 % interval."
        f"{' The beginning is above the frame.' if cut else ''} {where}",
        "Last points: " + "; ".join(f"{line.name} {line.ys[-1]:.3f} at {line.xs[-1]:.3g}" for line in known),
        known,
        x_label=x_label,
        y_label="nats per token",
        top=top,
    )


def _speed_up_figure(
    anchor: str, speed_ups: dict[str, dict[Axis, tuple[Estimate | None, int]]], where: str
) -> Figure | None:
    ratios = {name: of["tokens"][0] for name, of in speed_ups.items() if name != BASELINE}
    marks = [Mark(name=name, value=e.value, low=e.low, high=e.high) for name, e in ratios.items() if e is not None]
    if not marks:
        return None
    left_out = [name for name, e in ratios.items() if e is None]
    note = f" Not reached in every pair: {', '.join(left_out)}." if left_out else ""
    return figures.intervals(
        f"{anchor}-speed-up",
        f"Speed-up to {BASELINE}'s final loss, in tokens",
        f"So many times fewer tokens, mean over paired seeds, with its 95 % interval.{note} {where}",
        "; ".join(f"{name}: {interval(e, '.2f')}" for name, e in ratios.items() if e is not None),
        marks,
        x_label=f"{BASELINE}'s tokens / tokens to its final loss",
        reference=1,
    )


def _final_table(methods: Methods, differences: dict[str, Estimate | None], loss: Loss, where: str) -> Table:
    lines = []
    for name, runs in methods.items():
        finals = [value for run in runs if (value := _final(run, loss)) is not None]
        peaks = [run.peak for run in runs if run.peak is not None]
        difference = differences[name]
        last = [run.curve[-1] for run in runs]
        lines.append(
            [
                name,
                f"{len(runs)}",
                interval(mean(finals), ".4f") if finals else "",
                "" if name == BASELINE or difference is None else interval(difference, "+.4f"),
                f"{np.mean([point.tokens for point in last]):,.0f}",
                f"{np.mean([point.flops for point in last]):.3g}",
                duration(float(np.mean([point.seconds for point in last]))),
                memory(float(np.mean(peaks))) if peaks else "",
            ]
        )
    costs = ["tokens", "FLOPs", "wall-clock", "peak memory"]
    return Table(
        caption=f"Final loss on the {_LOSSES[loss]}, and what it cost",
        header=["method", "runs", "nats/token", f"- {BASELINE}, paired", *costs],
        lines=lines,
        notes=["Means over seeds with their 95 % intervals; costs include preparation.", where],
    )


def _choice_table(choices: Sequence[Row]) -> Table:
    lines = []
    for row in choices:
        tried = {weight: f"{loss:.4f}" for weight, loss in zip(row["weights"], row["values"], strict=True)}
        tried |= dict.fromkeys(row.get("diverged", []), "diverged")
        weights, losses = ", ".join(f"{weight:g}" for weight in tried), ", ".join(tried.values())
        lines.append([row["method"], f"{row['chosen']:g}", weights, losses, ", ".join(map(str, row["tuning_seeds"]))])
    return Table(
        caption="Weights, and how they were chosen",
        header=["method", "weight, chosen", "tried", "validation loss of each", "tuning seeds"],
        lines=lines,
        notes=[
            "The lowest mean loss on the validation split; results are read on another one. Of a choice at the "
            "end of what was tried, a better one may lie beyond it.",
            origin(choices, "choice"),
        ],
    )


def _speed_up_table(
    methods: Methods, speed_ups: dict[str, dict[Axis, tuple[Estimate | None, int]]], where: str
) -> Table:
    baselines = methods.get(BASELINE, [])
    lines = []
    for name, of in speed_ups.items():
        if name == BASELINE:
            continue
        num_pairs = len(_paired(methods[name], baselines))
        cells = [
            interval(ratio, ".3f") if ratio is not None else f"reached in {reached} of {num_pairs}"
            for ratio, reached in of.values()
        ]
        lines.append([name, f"{num_pairs}", *cells])
    return Table(
        caption=f"Speed-up to {BASELINE}'s final loss",
        header=["method", "pairs", *[f"in {label}" for label in _COSTS.values()]],
        lines=lines,
        notes=[
            f"{BASELINE}'s cost over the method's, each where its curve first was at {BASELINE}'s final loss of the "
            "same seed, linearly between evaluations; a mean only where every pair got there.",
            where,
        ],
    )
