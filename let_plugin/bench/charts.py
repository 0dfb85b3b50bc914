"""Figures as Vega-Lite specifications. Colors are the page's CSS variables, so that a figure follows its scheme."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from let_plugin.bench.rows import BASELINE

Spec = dict[str, Any]

AXES = {"tokens": "training tokens", "flops": "FLOPs, preparation included", "seconds": "seconds, preparation included"}
_HEIGHT = 320
_SERIES = [f"var(--series-{number})" for number in range(1, 9)]
# The page's light colors, for images.
LIGHT = {
    "text": "#1c2128",
    "muted": "#57606b",
    "line": "#dfe3e8",
    **dict(
        zip(
            (f"series-{number}" for number in range(1, 9)),
            ("#2563a8", "#b4540a", "#1f7a4d", "#7a4bb0", "#b3264a", "#0f7285", "#6f6a12", "#6b5b4d"),
            strict=True,
        )
    ),
}
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--text)",
        "gridColor": "var(--line)",
        "domainColor": "var(--muted)",
        "tickColor": "var(--muted)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "text": {"fontSize": 12},
}


def losses(curves: pd.DataFrame) -> Spec:
    """Held-out loss with bands, against tokens; each curve has its name at its end. Takes `frame.curves`."""
    labels = list(dict.fromkeys(curves["label"]))
    # Early losses are so much higher that nothing else could be told apart: the first fifth of the run is left out.
    curves = curves[curves["tokens"] >= 0.2 * curves["tokens"].max()]
    low, high = curves["low"].fillna(curves["loss"]).min(), curves["high"].fillna(curves["loss"]).max()
    domain = [low - 0.02 * (high - low), high + 0.02 * (high - low)]
    ends = curves.groupby("label", sort=False).tail(1).copy()
    ends["place"] = _apart(list(ends["loss"]), gap=14 * (domain[1] - domain[0]) / _HEIGHT)
    name = "held-out loss, nats/token"
    y_scale = {"domain": domain, "nice": False, "zero": False}
    tip = [{"field": "label", "title": "method"}, {"field": "step"}, {"field": "loss", "format": ".4f"}]
    tip += [{"field": end, "title": f"95 %, {end}", "format": ".4f"} for end in ("low", "high")]
    tip += [{"field": axis, "format": ".4~s"} for axis in AXES]
    return {
        "width": "container",
        "height": _HEIGHT,
        "padding": {"left": 5, "top": 5, "right": 14, "bottom": 5},
        "config": _CONFIG,
        "data": _data(curves.merge(ends[["label", "step", "place"]], how="left")),
        "encoding": {
            "x": {
                "field": "tokens",
                "type": "quantitative",
                "title": AXES["tokens"],
                "scale": {"zero": False},
                "axis": {"format": "~s", "tickCount": 5},
            },
            "color": _color(labels),
        },
        "layer": [
            {
                "mark": {"type": "area", "opacity": 0.14, "clip": True},
                "encoding": {"y": _y("low", y_scale, name), "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "line", "clip": True, "strokeWidth": 2},
                "encoding": {"y": _y("loss", y_scale, name)},
                "params": [_ZOOM],
            },
            {
                "mark": {"type": "point", "filled": True, "clip": True, "size": 70},
                "params": [_HOVER],
                "encoding": {
                    "y": _y("loss", y_scale, name),
                    "opacity": {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
                    "tooltip": tip,
                },
            },
            {
                "transform": [{"filter": "isValid(datum.place)"}],
                "mark": {"type": "text", "align": "left", "dx": 6, "fontWeight": 600, "clip": False},
                "encoding": {"y": _y("place", y_scale, name), "text": {"field": "label"}},
            },
        ],
    }


def ratios(frame: pd.DataFrame, column: str, bound: Mapping[str, float], title: str) -> Spec:
    """Ratios to plain: a line with the interval for each label, and a mark at its bound. Takes `costs`' frame."""
    values = [
        {"label": label, "ratio": e.value, "low": e.low, "high": e.high, "bound": bound[label]}
        for label, e in frame[column].items()
    ]
    y = {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 130, "ticks": False}}
    x = {"type": "quantitative", "scale": {"zero": False}, "title": title, "axis": {"tickCount": 5}}
    tip = [{"field": "label", "title": "case"}]
    tip += [{"field": name, "format": ".4f"} for name in ("ratio", "low", "high", "bound")]
    return {
        "width": "container",
        "height": 24 * len(values),
        "config": _CONFIG,
        "data": {"values": values},
        "layer": [
            {"mark": {"type": "rule", "color": "var(--muted)"}, "encoding": {"x": {"datum": 1}}},
            _ratio_mark(
                "rule",
                {"strokeWidth": 3, "color": _SERIES[0]},
                {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}},
            ),
            _ratio_mark(
                "point",
                {"filled": True, "size": 70, "opacity": 1, "color": _SERIES[0]},
                {"y": y, "x": x | {"field": "ratio"}, "tooltip": tip},
            ),
            _ratio_mark(
                "tick",
                {"thickness": 3, "height": 16, "color": _SERIES[1]},
                {"y": y, "x": x | {"field": "bound"}, "tooltip": tip},
            ),
        ],
    }


def metric(lines: pd.DataFrame, name: str) -> Spec:
    """A metric of runs over their steps. `lines` has the columns run, step and value."""
    tip = [{"field": "run"}, {"field": "step"}, {"field": "value", "format": ".4~g"}]
    return {
        "width": "container",
        "height": 220,
        "config": _CONFIG,
        "data": _data(lines),
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "color": _color(list(dict.fromkeys(lines["run"]))) | {"legend": {"orient": "top", "title": None}},
        },
        "layer": [
            {"mark": "line", "params": [_ZOOM], "encoding": {"y": _y("value", {"zero": False}, name)}},
            {
                "mark": {"type": "point", "filled": True, "size": 60},
                "params": [_HOVER],
                "encoding": {
                    "y": _y("value", {"zero": False}, name),
                    "opacity": {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
                    "tooltip": tip,
                },
            },
        ],
    }


def save(specs: Sequence[Spec], out: Path) -> None:
    """The figures, one below the other, as SVG or PNG, in the light colors."""
    import vl_convert

    config = _CONFIG | {"background": "white"}
    views = [{k: v for k, v in spec.items() if k != "config"} | {"width": 620} for spec in specs]
    whole = {"config": config, "vconcat": views}
    text = re.sub(r"var\(--([\w-]+)\)", lambda match: LIGHT[match[1]], json.dumps(whole))
    if out.suffix == ".svg":
        out.write_text(vl_convert.vegalite_to_svg(text))
    else:
        out.write_bytes(vl_convert.vegalite_to_png(text, scale=2))


# Wheel and touch alone still scroll the page.
_ZOOM = {
    "name": "zoom",
    "bind": "scales",
    "select": {"type": "interval", "zoom": "wheel![event.ctrlKey || event.shiftKey]"},
}
_HOVER = {"name": "hover", "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}}


def _data(values: pd.DataFrame) -> dict[str, Any]:
    return {"values": json.loads(values.to_json(orient="records"))}  # NaN is null


def _y(field: str, scale: Mapping[str, Any], title: str | None) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "scale": scale, "title": title}


def _color(labels: Sequence[str]) -> dict[str, Any]:
    others = [label for label in labels if label != BASELINE]
    colors = {label: _SERIES[number % len(_SERIES)] for number, label in enumerate(others)} | {BASELINE: "var(--text)"}
    scale = {"domain": labels, "range": [colors[label] for label in labels]}
    return {"field": "label" if BASELINE in labels else "run", "type": "nominal", "scale": scale, "legend": None}


def _ratio_mark(kind: str, style: Mapping[str, Any], encoding: Mapping[str, Any]) -> Spec:
    return {"mark": {"type": kind, **style}, "encoding": encoding}


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved as little as an even spread of those that collide needs, to be `gap` apart."""
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _start(groups[-1], places, gap) < _start(groups[-2], places, gap) + gap * len(
            groups[-2]
        ):
            last = groups.pop()
            groups[-1] += last
    moved = list(places)
    for group in groups:
        for number, index in enumerate(group):
            moved[index] = _start(group, places, gap) + number * gap
    return moved


def _start(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    return sum(places[index] for index in group) / len(group) - gap * (len(group) - 1) / 2
