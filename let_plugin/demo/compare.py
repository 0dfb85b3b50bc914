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
        speed = steps[TOKENS_PER_SECOND].groupby(is_active).median()
        target = next(iter(runs.values()))["held_out_loss"] if runs else None
        runs[name] = {
            "held_out_loss": curve[VALIDATION_LOSS].iloc[-1],
            "reached_first_at_step": step_at_loss(curve["step"], curve[VALIDATION_LOSS], target) if target else None,
            "tokens_per_second_with_teacher": speed.get(True),
            "tokens_per_second_without": speed.get(False),
            "peak_memory_gib": steps[PEAK_MEMORY].max(),
        }
    return {"steps": int(curve["step"].iloc[-1]), "runs": runs}


def table(result: Mapping[str, Any]) -> str:
    """The comparison as a small table for the console."""
    runs, steps = pd.DataFrame.from_dict(result["runs"], orient="index").astype(float), result["steps"]
    fewer = runs["reached_first_at_step"].map(lambda step: f"{step:.0f} of {steps}: {steps / step:.2f}x fewer")
    columns = {
        "held-out loss, nats/token": runs["held_out_loss"].map("{:.4f}".format),
        "difference": (runs["held_out_loss"] - runs["held_out_loss"].iloc[0]).map("{:+.4f}".format),
        f"steps to {runs.index[0]}'s loss": fewer.mask(runs["reached_first_at_step"].isna(), "not reached"),
        "tokens/s with teacher": runs["tokens_per_second_with_teacher"].map("{:,.0f}".format),
        "without": runs["tokens_per_second_without"].map("{:,.0f}".format),
        "peak GiB": runs["peak_memory_gib"].map("{:.2f}".format),
    }
    shown = pd.DataFrame(columns).replace("nan", "-")
    shown.iloc[0, 1:3] = "-"
    return shown.to_string()
