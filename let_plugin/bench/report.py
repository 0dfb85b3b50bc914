"""`let-bench report`: one page of what rows say. `let-bench plot`: curves of runs or rows."""

import difflib
import json
import math
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from let_plugin.bench import frame, tables
from let_plugin.bench.frame import Suite
from let_plugin.bench.rows import CONVERGE
from let_plugin.config.errors import ConfigError, Problem

METRICS = ("loss_metrics/global_avg_loss", "validation_metrics/loss", "let/cosine", "let/lambda", "throughput(tps)")


def write(files: Sequence[Path], out: Path) -> None:
    """Writes the page of the rows in `files` to the file `out`; an older one is replaced.

    ConfigError if a file is missing, holds no rows or nothing to compare, or if a library is missing.
    """
    problems = _missing_libraries()
    if out.is_dir():
        problems.append(Problem("--out", "is a folder; expected a file, page.html", str(out)))
    if problems:
        raise ConfigError(problems)
    suites = frame.newest(frame.suites(frame.read(files)))
    # What LET brings comes first, by the newest rows; then the rest as it is in the files.
    newest = max((suite for suite in suites if suite.kind == CONVERGE), key=lambda suite: suite.time, default=None)
    suites.sort(key=lambda suite: suite is not newest)
    _write_page(out, "LET: what it brings and what it costs", [_section(suite) for suite in suites])


def plot(paths: Sequence[Path], out: Path) -> None:
    """Draws curves to the file `out` (.html, .svg or .png); an older one is replaced.

    `paths` are dump folders of let-train, whose metrics are drawn, or files of rows: held-out losses of convergence.
    """
    problems = _missing_libraries()
    if out.suffix not in (".html", ".svg", ".png"):
        problems.append(Problem("--out", "expected a file that ends in .html, .svg or .png", str(out)))
    logs = [path / "metrics.jsonl" for path in paths if path.is_dir()]
    absent = [str(log.parent) for log in logs if not log.is_file()]
    problems += [Problem("RUN", "no metrics.jsonl in this folder", folder) for folder in absent]
    if problems:
        raise ConfigError(problems)
    from let_plugin.bench import charts

    draws = _metric_charts(logs)
    if files := [path for path in paths if not path.is_dir()]:
        suites = frame.suites(frame.read(files))
        draws += [partial(charts.losses, curves=frame.curves(suite)) for suite in suites if suite.kind == CONVERGE]
    if not draws:
        raise ConfigError(Problem("RUN", "nothing to draw in these", [str(path) for path in paths]))
    if out.suffix == ".html":
        _write_page(out, "Curves", [{"figure": charts.svg(charts.drawn(draws))}])
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        charts.drawn(draws).savefig(out)


def _section(suite: Suite) -> dict[str, Any]:
    """What the template shows of a suite."""
    configs = {row["label"]: row["config"] for row in suite.rows}
    (first, config), *rest = configs.items()
    versions = {", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in suite.rows}
    commits = {f"{row['commit']}{' (changed since)' if row['dirty'] else ''}" for row in suite.rows}
    times = sorted(row["time"] for row in suite.rows)
    when = f"{len(times)} runs from {times[0]} to {times[-1]}, commit {', '.join(sorted(commits))}"
    return {
        "name": suite.name,
        "figure": _figure(suite),
        "words": tables.verdicts(suite) if suite.kind == CONVERGE else [],
        "table": tables.table(suite).to_html(border=0),
        "notes": [*tables.notes(suite), *tables.choices(suite)],
        "profiles": [(name, cells.to_html(border=0)) for name, cells in map(tables.profile_table, suite.profiles)],
        "source": f"{when}, with {'; '.join(sorted(versions))}.",
        "commands": list(dict.fromkeys(row["command"] for row in suite.rows)),
        "configs": [(first, config), *((label, _changes(config, own, first, label)) for label, own in rest)],
    }


def _figure(suite: Suite) -> str:
    from let_plugin.bench import charts

    if suite.kind == CONVERGE:
        return charts.svg(charts.drawn([partial(charts.losses, curves=frame.curves(suite))]))
    others = suite.frame[~suite.frame["is_baseline"]]
    memory = next(name for name in others if name.endswith(" / plain"))
    kind = memory.removesuffix(" / plain")
    bound = 1 + others["memory_bound"] / (others[kind] - others["more_memory"])
    columns = {"step time": (others["step_time"], others["flop_bound"]), f"{kind} memory": (others[memory], bound)}
    pairs = {f"{name} / plain": (dict(found), dict(bounds)) for name, (found, bounds) in columns.items()}
    return charts.svg(charts.drawn([partial(charts.ratios, columns=pairs)]))


def _changes(config: str, own: str, first: str, label: str) -> str:
    """What `own` has that `config` has not, as a diff."""
    lines = difflib.unified_diff(config.splitlines(), own.splitlines(), first, label, lineterm="", n=1)
    return "\n".join(lines) or f"that of {first}"


def _metric_charts(logs: Sequence[Path]) -> list[Any]:
    from let_plugin.bench import charts

    lines = []
    for log in logs:
        for line in map(json.loads, log.read_text().splitlines()):
            known = {name: line[name] for name in METRICS if line.get(name) is not None and math.isfinite(line[name])}
            lines += [(log.parent.name, line["step"], name, value) for name, value in known.items()]
    found = pd.DataFrame(lines, columns=["run", "step", "name", "value"])
    own = {name: found[found["name"] == name] for name in METRICS}
    return [partial(charts.metric, lines=lines, name=name) for name, lines in own.items() if len(lines)]


def _write_page(out: Path, title: str, sections: Sequence[dict[str, Any]]) -> None:
    """Writes the page. Everything in it that comes from rows is escaped."""
    import jinja2

    loader = jinja2.PackageLoader("let_plugin.bench", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.jinja")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.render(title=title, sections=sections), encoding="utf-8")


def _missing_libraries() -> list[Problem]:
    message = 'needs {}; pip install "let-plugin[bench]"'
    missing = [name for name in ("jinja2", "matplotlib", "scipy") if find_spec(name) is None]
    return [Problem("let-bench", message.format(name)) for name in missing]
