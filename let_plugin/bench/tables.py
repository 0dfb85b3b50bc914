"""Tables of rows, as text: what `let-bench table` prints, and what a suite prints at its end."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from let_plugin.bench import frame
from let_plugin.bench.frame import Suite
from let_plugin.bench.rows import BASELINE, THROUGHPUT, Row

MIB = 2**20


def text(files: Sequence[Path], suite: str | None = None) -> str:
    """The table of each suite in files of rows, or of the suite of this id alone. ConfigError as `frame.suites`."""
    suites = frame.suites([row for row in frame.read(files) if suite is None or row.get("suite") == suite])
    return "\n\n".join(f"{own.name}\n\n" * (len(suites) > 1) + suite_text(own) for own in suites)


def suite_text(suite: Suite) -> str:
    parts = [lines(table(suite)), "\n".join(notes(suite))]
    parts += [f"{caption}:\n{lines(profile)}" for caption, profile in map(profile_table, suite.profiles)]
    parts += ["\n".join(words) for words in (choices(suite), verdicts(suite)) if words]
    return "\n\n".join(parts)


def lines(cells: pd.DataFrame) -> str:
    """Cells in columns: the index to the left, and the others to the right."""
    return "\n".join(line.rstrip() for line in cells.to_string().splitlines())


def table(suite: Suite) -> pd.DataFrame:
    """The suite's results as cells of text, for the console and the page."""
    make, first = (_cost_cells, "case") if suite.kind == THROUGHPUT else (_gain_cells, "method")
    cells = [make(line) for _, line in suite.frame.iterrows()]
    return pd.DataFrame(cells, index=suite.frame.index.rename(None)).rename_axis(columns=first)


def notes(suite: Suite) -> list[str]:
    """What was measured, and what the columns mean."""
    first = suite.rows[0]
    where = f"{first['device_name']} ({first['device']})"
    if suite.kind == THROUGHPUT:
        how = f"{first['num_processes']} process{'es' if first['num_processes'] > 1 else ''}"
        how += ", steps in turn" if first.get("interleaved") else ""
        said = [
            f"{suite.frame['step_time'].iloc[0].num} pairs on {where}, {how}; medians, and the mean ratio to plain "
            "with its 95 % interval.",
            "FLOP bound: 1 + N_T / (3 N_S), in distillation with the teacher's head. "
            "Memory bound: the teacher's parameters per rank + one activation.",
            f"Break-even: so many times fewer steps pay for a teacher that stays {first['stop_step']} of "
            f"{first['run_steps']} steps (in distillation: all of them).",
        ]
        if not first["peak_is_of_measured_steps"]:
            said.append("This kernel cannot reset a peak: memory is that of whole runs, also after the stop.")
        widths = suite.frame["step_time"].map(lambda ratio: ((ratio.high or 0) - (ratio.low or 0)) / 2)
        if wide := list(widths[widths > 0.05].index):
            said.append(f"The interval of {', '.join(wide)} is wide: take more --pairs, or --interleave.")
        if (slope := frame.slope(suite)) is not None:
            said.append(f"Overhead against N_T / N_S: slope {slope.text('.3f')}; the FLOP bound has 0.333.")
        return said
    seeds = list(dict.fromkeys(row["seed"] for row in suite.rows))
    tokens = " or ".join(f"{num:,}" for num in sorted({row["curve"]["tokens"][-1] for row in suite.rows}))
    said = [
        f"Seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))} on {where}; "
        f"{tokens} tokens each, the same in the same order. A seed sets the initial weights.",
        "Test loss in nats per token, on a split on which nothing was chosen. Means over the seeds, with 95 % "
        "intervals of the mean paired difference, and of the mean ratio.",
        f"Speed-up: how many times less it takes to reach {BASELINE}'s final test loss. FLOPs and seconds include the "
        "preparation, but not the evaluations.",
    ]
    for label, before in suite.frame["preparation"].items():
        if before["what"] != "nothing":
            seconds = "an unknown time" if before["seconds"] is None else f"{before['seconds']:,.0f} s"
            what = f"{before['what']}, {before['tokens']:,} tokens, {before['flops']:.3g} FLOPs, {seconds}"
            said.append(f"{label}: {what}.")
    for label, own in suite.diverged.items():
        which = ", ".join(map(str, sorted(own)))
        said.append(f"{label} has no result: it diverged with seed {which} (held-out loss is NaN).")
    return said


def verdicts(suite: Suite) -> list[str]:
    """The comparisons of a convergence suite in words. What stands in no column has its number here."""
    if not suite.comparisons:
        return []
    if all(difference.num < 2 for _, _, difference in suite.comparisons):
        return ["One seed: no difference here can be told from chance. Take more (--seeds)."]
    found: dict[str, dict[str, list[str]]] = {}
    for label, other, difference in suite.comparisons:
        groups = found.setdefault(other, {"better": [], "worse": [], "no difference resolved": [], "one seed": []})
        is_open = (difference.low or 0) <= 0 <= (difference.high or 0)
        verdict = "no difference resolved" if is_open else "better" if difference.value < 0 else "worse"
        text = label if other == BASELINE else f"{label} ({difference.text('+.4f')})"
        groups["one seed" if difference.num < 2 else verdict].append(text)
    said = []
    for other, groups in found.items():
        parts = (f"{verdict}: {', '.join(labels)}" for verdict, labels in groups.items() if labels)
        said.append(f"Against {other}: {'; '.join(parts)}.")
    num = f"{len(suite.comparisons)} comparisons, each at 95 % by itself"
    return [*said, f"{num}: of twenty without any difference, one is called significant on average."]


def choices(suite: Suite) -> list[str]:
    """What was chosen out of a grid, and by what."""

    def name(point: float | str) -> str:
        return point if isinstance(point, str) else f"{point:g}"  # several keys as text, or a weight

    said = []
    for row in suite.choices:
        diverged = row.get("diverged", [])
        grid = [*row["weights"], *diverged]
        losses = ", ".join(f"{name(w)}: {loss:.4f}" for w, loss in zip(row["weights"], row["values"], strict=True))
        seeds = ", ".join(map(str, row["tuning_seeds"]))
        chosen = row["chosen"] if isinstance(row["chosen"], str) else f"weight {row['chosen']:g}"
        line = f"{row['method']}: {chosen}, by the validation loss (seed {seeds}) of {losses}"
        line += f" (diverged: {', '.join(map(name, diverged))})" if diverged else ""
        values = [value for value in map(_number, grid) if value is not None]
        if len(values) > 1 and _number(row["chosen"]) in (min(values), max(values)):
            line += "; at the end of the grid, so a better one may lie beyond it"
        said.append(line)
    return said


def _number(point: float | str) -> float | None:
    """The value of a point of a grid of one key; None if it is no number, or there are several keys."""
    *keys, value = str(point).split(" ")
    try:
        return float(value) if len(keys) < 2 else None
    except ValueError:
        return None


def profile_table(row: Row) -> tuple[str, pd.DataFrame]:
    """Caption and cells: where the time of a profiled step goes."""
    step = median(row["values"])
    parts = {**row["parts"], "the student's own step": step - sum(row["parts"].values())}
    cells = [{"ms/step": f"{1000 * own:,.2f}", "of the step": f"{own / step:.2%}"} for own in parts.values()]
    bound = f"FLOP bound of LET {row['flop_bound']:.2%} of plain"
    caption = f"{row['label']}, profiled ({1000 * step:,.1f} ms/step; {bound})"
    return caption, pd.DataFrame(cells, index=list(parts)).rename_axis(columns="part")


def _cost_cells(line: pd.Series) -> dict[str, str]:
    cells = {
        "tokens/s": f"{line['tokens_per_second']:,.0f}",
        "ms/step": f"{1000 * line['seconds']:,.1f}",
        "step time / plain": line["step_time"].text(".4f"),
        "FLOP bound": f"{line['flop_bound']:.4f}",
    }
    for name in (name for name in line.index if name.endswith(" / plain")):
        kind = name.removesuffix(" / plain")
        cells |= {f"{kind} MiB": f"{line[kind] / MIB:,.1f}", name: line[name].text(".4f")}
    pays = "never" if pd.isna(line["break_even"]) else f"{line['break_even']:.3f}x"
    cells |= {"+ MiB": f"{line['more_memory'] / MIB:+,.1f}", "bound + MiB": f"{line['memory_bound'] / MIB:+,.1f}"}
    cells["break-even"] = pays if line["flop_bound"] > 1 else ""
    if line["is_baseline"]:
        cells |= {name: "1" for name in cells if name.endswith(" / plain")}
        cells |= dict.fromkeys(("FLOP bound", "+ MiB", "bound + MiB", "break-even"), "")
    return cells


def _gain_cells(line: pd.Series) -> dict[str, str]:
    is_baseline = line.name == BASELINE
    cells = {"seeds": f"{line['loss'].num}", "test loss": f"{line['loss'].value:.4f}"}
    cells[f"less {BASELINE}"] = "" if is_baseline else line["difference"].text("+.4f")
    for axis, name in (("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "seconds")):
        cells[f"speed-up, {name}"] = "1" if is_baseline else speed_up(line, axis)
    cells |= {"FLOPs": f"{line['flops']:.3g}", "seconds": f"{line['seconds']:,.0f}"}
    return cells | {f"{line['memory_kind']} MiB": f"{line['memory'] / MIB:,.0f}"}


def speed_up(line: pd.Series, axis: str) -> str:
    if line[f"{axis}_missed"]:
        return f"not reached by {line[f'{axis}_missed']} of {line['loss'].num}"
    return line[f"{axis}_ratio"].text(".3f", unit="x")
