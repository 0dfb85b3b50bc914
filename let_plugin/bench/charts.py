"""Figures as Vega-Lite specifications. Colors are the page's CSS variables, so that a figure follows its scheme."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from let_plugin.bench.rows import BASELINE

Spec = dict[str, Any]

AXES = {"tokens": "training tokens", "flops": "FLOPs, preparation included", "seconds": "seconds, preparation included"}
_HEIGHT = 320
_SERIES = [f"var(--series-{number})" for number in range(1, 9)]
# The page's light colors, for images.
LIGHT = {"text": "#1c2128", "muted": "#57606b", "line": "#dfe3e8", "series-1": "#2563a8", "series-2": "#b4540a"}
LIGHT |= {"series-3": "#1f7a4d", "series-4": "#7a4bb0", "series-5": "#b3264a", "series-6": "#0f7285"}
LIGHT |= {"series-7": "#6f6a12", "series-8": "#6b5b4d"}
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": "var(--muted)", "titleColor": "var(--text)", "gridColor": "var(--line)"}
    | {"domainColor": "var(--muted)", "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
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
    ends["place"] = _apart(ends["loss"], gap=14 * (domain[1] - domain[0]) / _HEIGHT)
    name = "held-out loss, nats/token"
    y_scale = {"domain": domain, "nice": False, "zero": False}
    tip = [{"field": "label", "title": "method"}, {"field": "step"}, {"field": "loss", "format": ".4f"}]
    tip += [{"field": end, "title": f"95 %, {end}", "format": ".4f"} for end in ("low", "high")]
    tip += [{"field": axis, "format": ".4~s"} for axis in AXES]
    x = {"field": "tokens", "type": "quantitative", "title": AXES["tokens"], "scale": {"zero": False}}
    band = {"y": _y("low", y_scale, name), "y2": {"field": "high"}}
    names = {"y": _y("place", y_scale, name), "text": {"field": "label"}}
    spec = _spec(_HEIGHT, curves.merge(ends[["label", "step", "place"]], how="left"))
    spec["padding"] = {"left": 5, "top": 5, "right": 14, "bottom": 5}
    spec["encoding"] = {"x": x | {"axis": {"format": "~s", "tickCount": 5}}, "color": _color("label", labels)}
    spec["layer"] = [
        _layer("area", band, opacity=0.14, clip=True),
        *_lines(_y("loss", y_scale, name), tip),
        _layer("text", names, align="left", dx=6, fontWeight=600, clip=False)
        | {"transform": [{"filter": "isValid(datum.place)"}]},
    ]
    return spec


def ratios(frame: pd.DataFrame, column: str, bound: str, title: str) -> Spec:
    """Ratios to plain: a line with the interval for each label, and a mark at its bound. Takes `costs`' frame."""
    estimates = pd.DataFrame(list(frame[column]), columns=["ratio", "low", "high", "num"])
    values = estimates.assign(label=list(frame.index), bound=list(frame[bound]))
    y = {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 130, "ticks": False}}
    x = {"type": "quantitative", "scale": {"zero": False}, "title": title, "axis": {"tickCount": 5}}
    tip = [{"field": "label", "title": "case"}]
    tip += [{"field": name, "format": ".4f"} for name in ("ratio", "low", "high", "bound")]
    spec = _spec(24 * len(values), values)
    spec["layer"] = [
        _layer("rule", {"x": {"datum": 1}}, color="var(--muted)"),
        _layer("rule", {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}}, color=_SERIES[0], strokeWidth=3),
        _layer("point", {"y": y, "x": x | {"field": "ratio"}, "tooltip": tip}, color=_SERIES[0], **_POINT),
        _layer("tick", {"y": y, "x": x | {"field": "bound"}, "tooltip": tip}, color=_SERIES[1], thickness=3, height=16),
    ]
    return spec


def metric(lines: pd.DataFrame, name: str) -> Spec:
    """A metric of runs over their steps. `lines` has the columns run, step and value."""
    tip = [{"field": "run"}, {"field": "step"}, {"field": "value", "format": ".4~g"}]
    color = _color("run", list(dict.fromkeys(lines["run"]))) | {"legend": {"orient": "top", "title": None}}
    spec = _spec(220, lines)
    spec["encoding"] = {"x": {"field": "step", "type": "quantitative", "title": "step"}, "color": color}
    return spec | {"layer": _lines(_y("value", {"zero": False}, name), tip)}


def save(specs: Sequence[Spec], out: Path) -> None:
    """The figures, one below the other, as SVG or PNG, in the light colors."""
    import vl_convert

    config = _CONFIG | {"background": "white"}
    views = [{k: v for k, v in spec.items() if k != "config"} | {"width": 620} for spec in specs]
    # Room on the right: a viewer's font may be wider than the one that the texts are measured with.
    whole = {"config": config, "vconcat": views, "padding": {"left": 5, "top": 5, "right": 40, "bottom": 5}}
    out.parent.mkdir(parents=True, exist_ok=True)
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
_POINT = {"filled": True, "size": 70, "opacity": 1}
_HOVER = {"name": "hover", "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}}


def _spec(height: int, values: pd.DataFrame) -> Spec:
    data = {"values": json.loads(values.to_json(orient="records"))}  # NaN is null
    return {"width": "container", "height": height, "config": _CONFIG, "data": data}


def _layer(mark: str, encoding: Mapping[str, Any], **style: Any) -> Spec:
    return {"mark": {"type": mark, **style}, "encoding": encoding}


def _lines(y: Mapping[str, Any], tip: Sequence[Mapping[str, str]]) -> list[Spec]:
    """Lines that can be zoomed, and points that show themselves and their numbers to the pointer."""
    opacity = {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0}
    points = _layer("point", {"y": y, "opacity": opacity, "tooltip": tip}, clip=True, **_POINT)
    return [_layer("line", {"y": y}, clip=True, strokeWidth=2) | {"params": [_ZOOM]}, points | {"params": [_HOVER]}]


def _y(field: str, scale: Mapping[str, Any], title: str | None) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "scale": scale, "title": title}


def _color(field: str, labels: Sequence[str]) -> dict[str, Any]:
    others = [label for label in labels if label != BASELINE]
    colors = {label: _SERIES[number % len(_SERIES)] for number, label in enumerate(others)} | {BASELINE: "var(--text)"}
    scale = {"domain": labels, "range": [colors[label] for label in labels]}
    return {"field": field, "type": "nominal", "scale": scale, "legend": None}


def _apart(places: pd.Series, gap: float) -> pd.Series:
    """The places, moved up where they must be to be `gap` apart: losses fall, so that there is room above."""
    order = places.sort_values()
    steps = gap * np.arange(len(order))
    return pd.Series(np.maximum.accumulate(order - steps) + steps, index=order.index)
