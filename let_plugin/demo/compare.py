"""Two runs that differ only in LET, side by side: what their `metrics.jsonl` say, as numbers and a table."""

from pathlib import Path
from typing import Any

import pandas as pd

from let_plugin.bench.frame import step_at_loss

VALIDATION_LOSS = "validation_metrics/loss"
TOKENS_PER_SECOND = "throughput(tps)"
PEAK_MEMORY = "memory/max_reserved(GiB)"


def compare(plain: Path, let: Path) -> dict[str, Any]:
    """The numbers of the runs in two dump folders; None where a run has none, such as no step after the stop.

    Losses are held-out ones, in nats per token. The first logged step does not count: it compiles and warms up.
    """
    plain_lines, let_lines = (
        pd.read_json(folder / "metrics.jsonl", lines=True, precise_float=True) for folder in (plain, let)
    )
    plain_curve, let_curve = (lines[["step", VALIDATION_LOSS]].dropna() for lines in (plain_lines, let_lines))
    plain_steps, let_steps = (lines[lines[VALIDATION_LOSS].isna()].iloc[1:] for lines in (plain_lines, let_lines))
    active = let_steps["let/active"] == 1
    phases = {"plain": plain_steps, "let_active": let_steps[active], "let_ended": let_steps[~active]}

    def of_phases(key: str, statistic: str) -> dict[str, float | None]:
        return {name: float(steps[key].agg(statistic)) if len(steps) else None for name, steps in phases.items()}

    steps, plain_loss = plain_curve.iloc[-1]
    return {
        "steps": int(steps),
        "held_out_loss": {"plain": plain_loss, "let": let_curve[VALIDATION_LOSS].iloc[-1]},
        "let_reached_plain_final_loss_at_step": step_at_loss(let_curve.to_numpy(), plain_loss),
        "tokens_per_second": of_phases(TOKENS_PER_SECOND, "median"),
        "peak_memory_gib": of_phases(PEAK_MEMORY, "max"),
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as a small table for the console."""
    loss, steps = result["held_out_loss"], result["steps"]
    verdict = f"LET did not reach the plain run's final loss in {steps} steps"
    if reached := result["let_reached_plain_final_loss_at_step"]:
        fewer = f"{steps / reached:.2f}x fewer steps"
        verdict = f"LET reached the plain run's final loss at step {reached:.0f} of {steps}: {fewer}"

    def cells(key: str, form: str) -> list[str]:
        return ["-" if value is None else format(value, form) for value in result[key].values()]

    let_loss = f"{loss['let']:.4f} ({loss['let'] - loss['plain']:+.4f})"
    lines = {
        "tokens/s (median)": cells("tokens_per_second", ",.0f"),
        "peak memory, GiB": cells("peak_memory_gib", ".2f"),
        "held-out loss, nats/token": [f"{loss['plain']:.4f}", "", let_loss],
    }
    columns = ["plain", "LET, teacher active", "LET, after the stop"]
    shown = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    return f"{shown.to_string(col_space=[len(name) + 1 for name in columns])}\n{verdict}"
