"""Runs side by side, the first of them without LET: what their `metrics.jsonl` say, as numbers and a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from let_plugin.bench.frame import step_at_loss

VALIDATION_LOSS = "validation_metrics/loss"
TOKENS_PER_SECOND = "throughput(tps)"
PEAK_MEMORY = "memory/max_reserved(GiB)"


def compare(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The numbers of runs, from their dump folders by name; None where a run has none, such as no step with a teacher.

    Losses are held-out ones, in nats per token. The first logged step does not count: it compiles and warms up.
    """
    runs: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        lines = pd.read_json(folder / "metrics.jsonl", lines=True, precise_float=True)
        curve = lines[["step", VALIDATION_LOSS]].dropna()
        steps = lines[lines[VALIDATION_LOSS].isna()].iloc[1:]
        is_active = steps.get("let/active", pd.Series(0, steps.index)) == 1
        of_phases = steps[TOKENS_PER_SECOND].groupby(is_active).median()
        runs[name] = {
            "held_out_loss": curve[VALIDATION_LOSS].iloc[-1],
            "reached_first_at_step": None,
            "tokens_per_second_with_teacher": of_phases.get(True),
            "tokens_per_second_without": of_phases.get(False),
            "peak_memory_gib": steps[PEAK_MEMORY].max(),
        }
        if len(runs) > 1:
            runs[name]["reached_first_at_step"] = step_at_loss(
                curve.to_numpy(), next(iter(runs.values()))["held_out_loss"]
            )
    return {"steps": int(curve["step"].iloc[-1]), "runs": runs}


def table(result: Mapping[str, Any]) -> str:
    """The comparison as a small table for the console."""
    (first, plain), *others = result["runs"].items()
    lines = {first: ["-", "-"]}
    for name, run in others:
        reached = run["reached_first_at_step"]
        fewer = (
            f"{reached:.0f} of {result['steps']}: {result['steps'] / reached:.2f}x fewer" if reached else "not reached"
        )
        lines[name] = [f"{run['held_out_loss'] - plain['held_out_loss']:+.4f}", fewer]
    shown = pd.DataFrame.from_dict(lines, orient="index", columns=["difference", f"steps to {first}'s loss"])
    shown.insert(0, "held-out loss, nats/token", [f"{run['held_out_loss']:.4f}" for run in result["runs"].values()])
    for title, key, form in (
        ("tokens/s with teacher", "tokens_per_second_with_teacher", "{:,.0f}"),
        ("without", "tokens_per_second_without", "{:,.0f}"),
        ("peak GiB", "peak_memory_gib", "{:.2f}"),
    ):
        shown[title] = ["-" if run[key] is None else form.format(run[key]) for run in result["runs"].values()]
    return shown.to_string()
