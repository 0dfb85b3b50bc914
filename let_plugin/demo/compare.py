"""Two runs that differ only in LET, side by side: what their `metrics.jsonl` say, as numbers, a table and a plot."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from let_plugin.bench.statistics import step_at_loss

VALIDATION_LOSS = "validation_metrics/loss"
TOKENS_PER_SECOND = "throughput(tps)"
PEAK_MEMORY = "memory/max_reserved(GiB)"


@dataclass(frozen=True)
class Run:
    """A run's logged steps.

    Attributes:
        folder: Its dump folder.
        train: The lines of `metrics.jsonl` that log training steps, in order.
        validation: (step, held-out loss in nats per token), in order.
    """

    folder: Path
    train: list[dict[str, Any]]
    validation: list[tuple[int, float]]

    @property
    def final_loss(self) -> float:
        """Held-out loss at the last evaluation."""
        return self.validation[-1][1]

    def over_steps(self, key: str, keep: Callable[[dict[str, Any]], bool]) -> list[float]:
        """Values of a metric over the logged steps that `keep` accepts.

        The first logged step is left out: it contains compilation and warm-up.
        """
        return [line[key] for line in self.train[1:] if keep(line)]


def read_run(folder: Path) -> Run:
    """Reads `folder`/metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(
        folder=folder,
        train=[line for line in lines if VALIDATION_LOSS not in line],
        validation=[(line["step"], line[VALIDATION_LOSS]) for line in lines if VALIDATION_LOSS in line],
    )


def compare(plain: Run, let: Run) -> dict[str, Any]:
    """The numbers of the comparison; None where a run has none (no step after the stop, say)."""

    def active(line: dict[str, Any]) -> bool:
        return line["let/active"] == 1

    def ended(line: dict[str, Any]) -> bool:
        return line["let/active"] == 0

    def median(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    def peak(values: list[float]) -> float | None:
        return max(values, default=None)

    return {
        "steps": plain.validation[-1][0],
        "held_out_loss": {"plain": plain.final_loss, "let": let.final_loss},
        "let_reached_plain_final_loss_at_step": step_at_loss(let.validation, plain.final_loss),
        "tokens_per_second": {
            "plain": median(plain.over_steps(TOKENS_PER_SECOND, lambda _: True)),
            "let_active": median(let.over_steps(TOKENS_PER_SECOND, active)),
            "let_ended": median(let.over_steps(TOKENS_PER_SECOND, ended)),
        },
        "peak_memory_gib": {
            "plain": peak(plain.over_steps(PEAK_MEMORY, lambda _: True)),
            "let_active": peak(let.over_steps(PEAK_MEMORY, active)),
            "let_ended": peak(let.over_steps(PEAK_MEMORY, ended)),
        },
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as a small table for the console."""
    loss, speed, memory = (result[key] for key in ("held_out_loss", "tokens_per_second", "peak_memory_gib"))
    difference = loss["let"] - loss["plain"]
    reached = result["let_reached_plain_final_loss_at_step"]
    if reached is None:
        verdict = f"LET did not reach the plain run's final loss in {result['steps']} steps"
    else:
        verdict = (
            f"LET reached the plain run's final loss at step {reached:.0f} of {result['steps']}: "
            f"{result['steps'] / reached:.2f}x fewer steps"
        )

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        ("", "plain", "LET, teacher active", "LET, after the stop"),
        ("tokens/s (median)", *(number(speed[k], ",.0f") for k in ("plain", "let_active", "let_ended"))),
        ("peak memory, GiB", *(number(memory[k], ".2f") for k in ("plain", "let_active", "let_ended"))),
        ("held-out loss, nats/token", f"{loss['plain']:.4f}", "", f"{loss['let']:.4f} ({difference:+.4f})"),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, verdict])


def plot(plain: Run, let: Run, path: Path) -> None:
    """Writes a PNG: both held-out curves, and below them lambda and the cosine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 2), layout="constrained")
    for run, name, colour in ((plain, "plain", "tab:grey"), (let, "LET", "tab:blue")):
        upper.plot(*zip(*run.validation, strict=True), marker="o", markersize=3, color=colour, label=name)
    upper.axhline(plain.final_loss, color="tab:grey", linewidth=0.8, linestyle=":")
    upper.set_ylabel("held-out loss (nats per token)")
    upper.legend()

    steps = [line["step"] for line in let.train]
    lower.plot(steps, [line["let/lambda"] for line in let.train], color="tab:orange", label="lambda")
    lower.set_ylabel("lambda", color="tab:orange")
    cosine_axis = lower.twinx()
    cosines = [(line["step"], line["let/cosine"]) for line in let.train if "let/cosine" in line]
    if cosines:
        cosine_axis.plot(*zip(*cosines, strict=True), color="tab:blue")
    cosine_axis.set_ylabel("cosine with the teacher", color="tab:blue")
    lower.set_xlabel("step")
    figure.savefig(path, dpi=130)
    plt.close(figure)
