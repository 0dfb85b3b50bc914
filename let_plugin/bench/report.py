"""`let-bench report`: one page of what rows say. `let-bench plot`: curves of runs or rows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from let_plugin.bench import charts, frame, tables
from let_plugin.bench.charts import Spec
from let_plugin.bench.frame import Suite
from let_plugin.bench.rows import BASELINE, CONVERGE, THROUGHPUT
from let_plugin.config.errors import ConfigError, Problem, raise_if_any

METRICS = (
    *("loss_metrics/global_avg_loss", "validation_metrics/loss", "let/cosine", "let/distillation_loss"),
    *("let/auxiliary_loss", "let/lambda", "throughput(tps)"),
)
_BRINGS = [f"less {BASELINE}", "speed-up, tokens"]  # columns of the overview
_TEACHER_SHARE = 0.1  # the paper's: of several teachers the overview shows the one nearest to it


def write(files: Sequence[Path], out: Path) -> None:
    """Writes the page of the rows in `files` to `out`; an older one is replaced. ConfigError as `frame.suites`."""
    # Of suites of a kind with the same name, the last.
    suites = list({(suite.kind, suite.name): suite for suite in frame.suites(frame.read(files))}.values())
    gains = [suite for suite in suites if suite.kind == CONVERGE][-1:]
    costs = [suite for suite in suites if suite.kind == THROUGHPUT]
    content = {
        "figures": [charts.losses(frame.curves(suite)) for suite in gains],
        "gains": [(suite, tables.table(suite)[_BRINGS].drop(index=BASELINE)) for suite in gains],
        "costs": [_cost_overview(costs)] if costs else [],
        "suites": [(suite, [] if suite in gains else _figures(suite)) for suite in suites],
    }
    _write_page(out, title="LET: what it brings and what it costs", **content)


def plot(paths: Sequence[Path], out: Path) -> None:
    """Draws curves to the file `out` (.html, .svg or .png); an older one is replaced. ConfigError as `frame.suites`.

    `paths` are dump folders of let-train, whose metrics are drawn, or files of rows, for held-out losses.
    """
    problems = []
    if out.suffix not in (".html", ".svg", ".png"):
        problems.append(Problem("--out", "expected a file that ends in .html, .svg or .png", str(out)))
    logs = [path / "metrics.jsonl" for path in paths if path.is_dir()]
    absent = [str(log.parent) for log in logs if not log.is_file()]
    problems += [Problem("RUN", "no metrics.jsonl in this folder", folder) for folder in absent]
    raise_if_any(problems)
    specs = _metric_charts(logs) if logs else []
    if files := [path for path in paths if not path.is_dir()]:
        suites = {suite.name: suite for suite in frame.suites(frame.read(files)) if suite.kind == CONVERGE}
        specs += [charts.losses(frame.curves(suite)) | {"title": name} for name, suite in suites.items()]
    if not specs:
        raise ConfigError(Problem("RUN", "nothing to draw in these", [str(path) for path in paths]))
    if out.suffix == ".html":
        _write_page(out, title="Curves", figures=specs, suites=[])
    else:
        charts.save(specs, out)


def _cost_overview(suites: Sequence[Suite]) -> pd.DataFrame:
    """What LET costs, as cells of text: of each suite the teacher nearest to a tenth of the student, and its stop."""
    found = []
    for suite in suites:
        lines = suite.frame[suite.frame["case"].isin(["active", "stopped"])]
        nearest = (lines["share"] - _TEACHER_SHARE).abs().groupby(lines["case"]).idxmin()
        memory = f"{suite.frame['memory_kind'].iloc[0]} / plain"
        cells = tables.table(suite).loc[nearest, ["step time / plain", "FLOP bound", memory]]
        cells.insert(0, "teacher / student", lines["share"].map("{:.0%}".format))
        cells.insert(0, "device", suite.rows[0]["device_name"])
        cells.index = [f"{suite.name}: {case}" for case in lines.loc[nearest, "case"]]
        found.append(cells.rename(columns={memory: "memory / plain"}))
    return pd.concat(found)


def _figures(suite: Suite) -> list[Spec]:
    if suite.kind == CONVERGE:
        return [charts.losses(frame.curves(suite))]
    others, kind = suite.frame[~suite.frame["is_baseline"]], suite.frame["memory_kind"].iloc[0]
    return [
        charts.ratios(others, "step_time", "flop_bound", "step time / plain"),
        charts.ratios(others, f"{kind} / plain", "memory_bound_ratio", f"{kind} memory / plain"),
    ]


def _metric_charts(logs: Sequence[Path]) -> list[Spec]:
    names = [log.parent.name for log in logs]
    names = names if len(set(names)) == len(names) else [str(log.parent) for log in logs]
    runs = [pd.read_json(log, lines=True).assign(run=name) for name, log in zip(names, logs, strict=True)]
    lines = pd.concat(runs).reindex(columns=["run", "step", *METRICS]).melt(["run", "step"], var_name="name")
    known = lines.replace([math.inf, -math.inf], math.nan).dropna()
    return [charts.metric(own, str(name)) for name, own in known.groupby("name", sort=False)]


def _write_page(out: Path, **content: Any) -> None:
    """Everything in it that comes from rows is escaped."""
    import jinja2
    import vl_convert

    loader = jinja2.PackageLoader("let_plugin.bench", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.jinja")
    content |= {"light": charts.LIGHT, "axes": charts.AXES, "tables": tables}
    content["library"] = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub wants a snippet
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.render(content), encoding="utf-8")
