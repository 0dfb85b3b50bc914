"""From convergence rows to a table for the console, and what it says in words. Every number comes from the rows."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from let_plugin.bench.converge.curves import CHOICE, KIND, diverged_seeds
from let_plugin.bench.converge.methods import CONTROLS
from let_plugin.bench.rows import Row
from let_plugin.bench.statistics import Estimate, paired_difference, paired_ratio, step_at_loss
from let_plugin.bench.summary import aligned

_MIB = 2**20


def loss_difference(own: Sequence[Row], baseline: Sequence[Row]) -> Estimate:
    """Final test loss less the baseline's, in nats per token, paired by seed."""
    return paired_difference(*([row["final_test_loss"] for row in rows] for rows in (own, baseline)))


def speed_up(own: Sequence[Row], baseline: Sequence[Row], axis: str) -> tuple[Estimate | None, int]:
    """How many times less it takes until the test loss is what the baseline's run of the same seed ends with.

    Both are taken where their curve is first there, linearly between evaluations.

    Args:
        own: Rows of a method, by seed.
        baseline: The baseline's, of the same seeds.
        axis: Of the curve: "step", "flops" or "seconds".

    Returns:
        The ratio, and how many of the runs never got there; it is None if there are any.
    """
    reached = [_reached(row, base["final_test_loss"], axis) for row, base in zip(own, baseline, strict=True)]
    missed = sum(value is None for value in reached)
    if missed:
        return None, missed
    goals = [_reached(row, row["final_test_loss"], axis) for row in baseline]
    return paired_ratio([g for g in goals if g is not None], [r for r in reached if r is not None]), 0


def table(
    results: Mapping[str, Sequence[Row]],
    choices: Sequence[Row],
    diverged: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> str:
    """The suite's results as text.

    Args:
        results: Label -> its rows, one per seed and in the same order for all; the first label is the baseline.
        choices: The rows of the choices that were made.
        diverged: Label -> seeds, of what has no result.
    """
    (baseline_label, baseline), *others = results.items()
    peaks = baseline[0]["peak_memory_bytes"]
    kind = max(peaks, key=peaks.get)  # what an accelerator's allocator holds, beside what it gives out
    header = ["method", "test loss", f"less {baseline_label}", "speed-up, steps", "speed-up, FLOPs"]
    header += ["FLOPs", "seconds", f"{kind} MiB"]
    body = []
    for name, own in results.items():
        cells = ["", "1", "1"]
        if name != baseline_label:
            cells = [_signed(loss_difference(own, baseline))]
            cells += [_speed(*speed_up(own, baseline, axis), len(own)) for axis in ("step", "flops")]
        body.append(
            [
                name,
                f"{_mean(own, lambda row: row['final_test_loss']):.4f}",
                *cells,
                f"{_mean(own, lambda row: row['curve']['flops'][-1]):.3g}",
                f"{_mean(own, lambda row: row['curve']['seconds'][-1]):,.0f}",
                f"{_mean(own, lambda row: row['peak_memory_bytes'][kind]) / _MIB:,.0f}",
            ]
        )
    seeds = [row["seed"] for row in baseline]
    first = baseline[0]
    notes = [
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'} ({', '.join(map(str, seeds))}) of each method on "
        f"{first['device_name']} ({first['device']}); {first['curve']['tokens'][-1]:,} tokens each, the same in the "
        "same order. A seed changes the initial weights.",
        "Test loss in nats per token, on a split that nothing was chosen on. Means over the seeds, and 95 % intervals "
        "of the mean paired difference, and of the mean ratio.",
        f"Speed-up: how many times less it takes until {baseline_label}'s final test loss. FLOPs and seconds have the "
        "preparation in them, evaluations not.",
        *_preparation_notes(results),
        *(f"{label} has no result: {diverged_with(seeds)}." for label, seeds in diverged.items()),
    ]
    parts = ["\n".join(aligned([header, *body])), "\n".join(notes)]
    if choices:
        parts.append("\n".join(_choice(row) for row in choices))
    if others:
        parts.append("\n".join(_verdicts(results, baseline_label)))
    return "\n\n".join(parts)


def of_rows(found: Sequence[Row]) -> str:
    """`table` of a suite's rows, in the order in which they were measured, of the seeds that all labels have.

    Empty for a suite that has no such seed yet, or the baseline alone.
    """
    results: dict[str, dict[int, Row]] = {}
    choices = {row["method"]: row for row in found if row["kind"] == CHOICE}  # the latest
    for row in found:
        if row["kind"] == KIND and row["role"] == "result":
            results.setdefault(row["label"], {})[row["seed"]] = row
    diverged = diverged_seeds(found)
    results = {label: own for label, own in results.items() if label not in diverged}
    seeds = [seed for seed in next(iter(results.values()), ()) if all(seed in own for own in results.values())]
    if len(results) + len(diverged) < 2 or not seeds:
        return ""
    shown = {label: [own[seed] for seed in seeds] for label, own in results.items()}
    return table(shown, list(choices.values()), diverged)


def diverged_with(seeds: Sequence[int]) -> str:
    return f"it diverged with seed {', '.join(map(str, sorted(seeds)))} (its held-out loss was no number any more)"


def _verdicts(results: Mapping[str, Sequence[Row]], baseline_label: str) -> list[str]:
    baseline = results[baseline_label]
    if len(baseline) < 2:
        return ["One seed: no difference here can be told from chance. Take more (--seeds)."]
    pairs = [(name, baseline_label) for name in results if name != baseline_label]
    lets = [name for name, own in results.items() if own[0]["method"] == "let"]
    # A control says something of LET at its own weight.
    pairs += [
        (let, name)
        for let in lets
        for name, own in results.items()
        if own[0]["method"] in CONTROLS and own[0]["weight"] == results[let][0]["weight"]
    ]
    lines = []
    for name, other in pairs:
        difference = loss_difference(results[name], results[other])
        interval = f"(95 %: {difference.low:+.4f} to {difference.high:+.4f})"
        if difference.contains(0):
            lines.append(f"{name} and {other}: no difference is resolved, {difference.value:+.4f} {interval}")
        else:
            verdict = f"{'better' if difference.value < 0 else 'worse'} than {other}, significantly"
            lines.append(f"{name} is {verdict}: {difference.value:+.4f} {interval}")
    share = f"{len(pairs)} comparisons, each at 95 % by itself"
    lines.append(f"{share}: of twenty without any difference, one is called significant on average.")
    return lines


def _choice(row: Row) -> str:
    losses = ", ".join(f"{w:g}: {loss:.4f}" for w, loss in zip(row["weights"], row["values"], strict=True))
    seeds = ", ".join(map(str, row["tuning_seeds"]))
    line = f"{row['method']}: weight {row['chosen']:g}, by the validation loss (seed {seeds}) of {losses}"
    diverged = row.get("diverged", [])
    if diverged:
        line += f" (diverged: {', '.join(f'{weight:g}' for weight in diverged)})"
    grid = [*row["weights"], *diverged]
    at_end = len(grid) > 1 and row["chosen"] in (min(grid), max(grid))
    return f"{line}; at the end of the grid, so a better one may lie beyond it" if at_end else line


def _preparation_notes(results: Mapping[str, Sequence[Row]]) -> list[str]:
    notes = []
    for name, own in results.items():
        before = own[0]["preparation"]
        if before["what"] == "nothing":
            continue
        seconds = "a time that is not known" if before["seconds"] is None else f"{before['seconds']:,.0f} s"
        notes.append(f"{name}: {before['what']}, {before['tokens']:,} tokens, {before['flops']:.3g} FLOPs, {seconds}.")
    return notes


def _reached(row: Row, loss: float, axis: str) -> float | None:
    return step_at_loss(list(zip(row["curve"][axis], row["curve"]["test_loss"], strict=True)), loss)


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return sum(map(value, rows)) / len(rows)


def _signed(estimate: Estimate) -> str:
    interval = "" if estimate.low is None else f" [{estimate.low:+.4f}, {estimate.high:+.4f}]"
    return f"{estimate.value:+.4f}{interval}"


def _speed(estimate: Estimate | None, missed: int, num: int) -> str:
    if estimate is None:
        return f"not reached by {missed} of {num}"
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}x{interval}"
