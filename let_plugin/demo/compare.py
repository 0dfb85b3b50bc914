"""Two runs that differ only in LET, side by side: what their `metrics.jsonl` say, as numbers and a table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from let_plugin.bench.frame import step_at_loss

VALIDATION_LOSS = "validation_metrics/loss"
TOKENS_PER_SECOND = "throughput(tps)"
PEAK_MEMORY = "memory/max_reserved(GiB)"


@dataclass(frozen=True)
class History:
    """What a run has logged."""

    train: list[dict[str, Any]]  # the lines of metrics.jsonl that log training steps, in order
    validation: list[tuple[int, float]]  # (step, held-out loss in nats per token), in order

    def values(self, key: str, active: int | None = None) -> list[float]:
        """A metric over the logged steps, or over those with the teacher (1) or without it (0).

        The first logged step is left out: it contains compilation and warm-up.
        """
        return [line[key] for line in self.train[1:] if active in (None, line.get("let/active"))]


def read(folder: Path) -> History:
    """Reads `folder`/metrics.jsonl. Of a step that a resumed run has logged twice, the later line counts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = {line["step"]: line for line in lines if VALIDATION_LOSS not in line}
    validation = {line["step"]: line[VALIDATION_LOSS] for line in lines if VALIDATION_LOSS in line}
    return History([train[step] for step in sorted(train)], sorted(validation.items()))


def compare(plain: History, let: History) -> dict[str, Any]:
    """The numbers of the comparison; None where a run has none, such as no step after the stop."""

    def of_phases(key: str, statistic: Any) -> dict[str, float | None]:
        phases = {"plain": plain.values(key), "let_active": let.values(key, 1), "let_ended": let.values(key, 0)}
        return {name: statistic(values) if values else None for name, values in phases.items()}

    steps, plain_loss = plain.validation[-1]
    return {
        "steps": steps,
        "held_out_loss": {"plain": plain_loss, "let": let.validation[-1][1]},
        "let_reached_plain_final_loss_at_step": step_at_loss(let.validation, plain_loss),
        "tokens_per_second": of_phases(TOKENS_PER_SECOND, median),
        "peak_memory_gib": of_phases(PEAK_MEMORY, max),
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as a small table for the console."""
    loss, steps = result["held_out_loss"], result["steps"]
    let_loss = f"{loss['let']:.4f} ({loss['let'] - loss['plain']:+.4f})"
    verdict = f"LET did not reach the plain run's final loss in {steps} steps"
    if reached := result["let_reached_plain_final_loss_at_step"]:
        fewer = f"{steps / reached:.2f}x fewer steps"
        verdict = f"LET reached the plain run's final loss at step {reached:.0f} of {steps}: {fewer}"

    def cells(key: str, form: str) -> Sequence[str]:
        return ["-" if value is None else format(value, form) for value in result[key].values()]

    lines = [
        ("", "plain", "LET, teacher active", "LET, after the stop"),
        ("tokens/s (median)", *cells("tokens_per_second", ",.0f")),
        ("peak memory, GiB", *cells("peak_memory_gib", ".2f")),
        ("held-out loss, nats/token", f"{loss['plain']:.4f}", "", let_loss),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([*padded, verdict])
