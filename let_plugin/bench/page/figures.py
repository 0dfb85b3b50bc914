"""Drawings, by matplotlib: as SVG in the page's colours (CSS variables, so that dark mode reaches them), and as PNG."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from let_plugin.bench.page.parts import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of the light page, which are those of a PNG, and the variables that the page has for them.
_TEXT, _MUTED, _GRID = "#1c2128", "#57606b", "#dfe3e8"
_SERIES = ("#2563a8", "#b4540a", "#1f7a4d", "#7a4bb0", "#b3264a", "#0f7285", "#6f6a12", "#6b5b4d")
_VARIABLES = {_TEXT: "--text", _MUTED: "--muted", _GRID: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES, start=1)
}
_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_SIZE = (5.2, 3.6)  # inches: about as wide as a telephone, so that text is as large there as it was drawn

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.labelcolor": _TEXT,
    "axes.labelsize": 9,
    "axes.prop_cycle": "cycler('color', ['#1c2128'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": _TEXT,
    "svg.fonttype": "none",
    "text.color": _TEXT,
    "text.parse_math": False,  # names are not formulas
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line, with or without its band.

    Attributes:
        name: For the legend.
        xs: Values along the axis.
        ys: A value for each x.
        lows: Lower end of the interval for each x, or None.
        highs: Upper end.
        is_baseline: Drawn in the colour of text.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    is_baseline: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value with its interval, and the bound that it is compared with, on a line of its own."""

    name: str
    value: float
    low: float | None
    high: float | None
    bound: float | None = None


def curves(
    name: str,
    title: str,
    caption: str,
    description: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    top: float | None = None,
) -> Figure:
    """Lines with bands. `top`: where the frame ends."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import EngFormatter

        others = iter(range(len(series)))
        for line in series:
            number = next(others) if not line.is_baseline else 0
            colour = _TEXT if line.is_baseline else _SERIES[number % len(_SERIES)]
            style = "-" if line.is_baseline else _STYLES[number // len(_SERIES) % len(_STYLES)]
            axes.plot(line.xs, line.ys, color=colour, linestyle=style, linewidth=1.6, label=line.name)
            ends = [(x, a, b) for x, a, b in zip(line.xs, line.lows, line.highs, strict=False) if None not in (a, b)]
            if ends:
                xs, lows, highs = zip(*ends, strict=True)
                axes.fill_between(xs, lows, highs, color=colour, alpha=0.16, linewidth=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xlim(left=0)
        if top is not None:
            axes.set_ylim(top=top)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, borderaxespad=0)

    return _figure(name, title, caption, description, draw, _SIZE)


def intervals(
    name: str,
    title: str,
    caption: str,
    description: str,
    marks: Sequence[Mark],
    *,
    x_label: str,
    reference: float,
    bound_name: str = "",
) -> Figure:
    """A line for each mark, from above to below, and an upright one at the value of no difference."""

    def draw(axes: "Axes") -> None:
        places = list(range(len(marks)))[::-1]
        axes.axvline(reference, color=_MUTED, linewidth=1)
        for place, mark in zip(places, marks, strict=True):
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.low, mark.high], [place, place], color=_SERIES[0], linewidth=2.4, label="_")
            axes.plot([mark.value], [place], "o", color=_SERIES[0], markersize=6, label="_")
            if mark.bound is not None:
                axes.plot([mark.bound], [place], "|", color=_SERIES[1], markersize=13, markeredgewidth=2.2, label="_")
        axes.set_yticks(places, [mark.name for mark in marks])
        axes.tick_params(axis="y", length=0, labelcolor=_TEXT)
        axes.set_ylim(-0.7, len(marks) - 0.3)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(x_label)
        axes.plot([], [], "o-", color=_SERIES[0], linewidth=2.4, label="measured, with 95 % interval")
        if any(mark.bound is not None for mark in marks):
            axes.plot([], [], "|", color=_SERIES[1], markersize=11, markeredgewidth=2.2, label=bound_name)
        below = -0.62 / (0.34 * len(marks) + 0.4)
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, below), ncols=2, borderaxespad=0)

    return _figure(name, title, caption, description, draw, (_SIZE[0], 1.3 + 0.34 * len(marks)))


def fits(
    name: str,
    title: str,
    caption: str,
    description: str,
    points: Sequence[Series],
    lines: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    is_log2: bool = False,
) -> Figure:
    """Points, each with the line through them: a colour per pair of both. Lines beyond the points are dashed bounds."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

        for number, line in enumerate(lines):
            if number < len(points):
                axes.plot(line.xs, line.ys, color=_SERIES[2 * number % len(_SERIES)], linewidth=1.6, label=line.name)
            else:
                style = _STYLES[1]
                axes.plot(line.xs, line.ys, color=_SERIES[1], linestyle=style, linewidth=1.6, label=line.name)
        for number, cloud in enumerate(points):
            colour = _SERIES[2 * number % len(_SERIES)]
            axes.plot(cloud.xs, cloud.ys, "o", color=colour, markersize=4, alpha=0.7, label=cloud.name)
        if is_log2:
            axes.set_xscale("log", base=2)
            sizes = sorted({x for cloud in points for x in cloud.xs})
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        else:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, borderaxespad=0)

    return _figure(name, title, caption, description, draw, _SIZE)


def _figure(
    name: str,
    title: str,
    caption: str,
    description: str,
    draw: Callable[["Axes"], None],
    size: tuple[float, float],
) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure as Canvas  # without pyplot, which keeps figures and looks for a display

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        canvas = Canvas(figsize=size)
        draw(canvas.add_subplot())
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        canvas.savefig(png, format="png", dpi=200, facecolor="white", bbox_inches="tight")
    return Figure(
        name=name,
        title=title,
        caption=caption,
        description=description,
        svg=_for_page(svg.getvalue(), name),
        png=png.getvalue(),
    )


def _for_page(svg: str, name: str) -> str:
    """matplotlib's file as an element of a page: nothing around it, the page's colours, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # Text without a colour is black.
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title {name}-description" ', 1)
    return re.sub(r"\n\s*", "\n", svg)
