"""Figures of rows and of runs, each a function that draws on a matplotlib figure or a part of one."""

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import pandas as pd
from matplotlib.figure import Figure, FigureBase

from let_plugin.bench.frame import Estimate
from let_plugin.bench.rows import BASELINE

AXES = {"tokens": "training tokens", "flops": "FLOPs, preparation included", "seconds": "seconds, preparation included"}

Draw = Callable[[FigureBase], None]


def drawn(draws: Sequence[Draw]) -> Figure:
    """The figures, one below the other."""
    whole = Figure(figsize=(12, 3.6 * len(draws)), layout="constrained")
    for part, draw in zip(whole.subfigures(len(draws), 1, squeeze=False).flat, draws, strict=True):
        draw(part)
    return whole


def svg(figure: Figure) -> str:
    """The figure as an element of an HTML page, with its texts as text."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(stream, format="svg")
    text = stream.getvalue()
    return text[text.index("<svg") :]


def losses(figure: FigureBase, curves: pd.DataFrame) -> None:
    """Held-out loss with bands, against what it took. Takes `frame.curves`."""
    # Early losses are so much higher that nothing else could be told apart: the first fifth of the run is left out.
    curves = curves[curves["tokens"] >= 0.2 * curves["tokens"].max()]
    subplots = figure.subplots(1, len(AXES), sharey=True)
    for axes, (column, name) in zip(subplots, AXES.items(), strict=True):
        for (label, own), color in zip(curves.groupby("label", sort=False), _colors(curves["label"]), strict=True):
            axes.plot(own[column], own["loss"], color=color, label=label)
            axes.fill_between(own[column], own["low"], own["high"], color=color, alpha=0.14, linewidth=0)
        axes.set_xlabel(name)
    subplots[0].set_ylabel("held-out loss, nats/token")
    subplots[0].legend()


def ratios(figure: FigureBase, columns: Mapping[str, tuple[Mapping[str, Estimate], Mapping[str, float]]]) -> None:
    """Ratios to plain with intervals, and marks at bounds: what they are of -> (label -> ratio, label -> bound)."""
    subplots = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, (found, bounds)) in zip(subplots, columns.items(), strict=True):
        for label, estimate in list(found.items())[::-1]:
            low, high = estimate.low or estimate.value, estimate.high or estimate.value
            axes.plot([low, high], [label, label], color="C0", linewidth=3)
            axes.plot([estimate.value], [label], "o", color="C0")
            axes.plot([bounds[label]], [label], "|", color="C1", markersize=16, markeredgewidth=3)
        axes.axvline(1, color="grey")
        axes.set_xlabel(name)


def metric(figure: FigureBase, lines: pd.DataFrame, name: str) -> None:
    """A metric of runs over their steps. `lines` has the columns run, step and value."""
    axes = figure.subplots()
    for (run, own), color in zip(lines.groupby("run", sort=False), _colors(lines["run"]), strict=True):
        axes.plot(own["step"], own["value"], color=color, label=run)
    axes.set(xlabel="step", ylabel=name)
    axes.legend()


def _colors(labels: pd.Series) -> list[str]:
    """Of each label in order: the baseline is black, and does not change the others' colors."""
    names = list(dict.fromkeys(labels))
    others = [name for name in names if name != BASELINE]
    return ["black" if name == BASELINE else f"C{others.index(name) % 10}" for name in names]
