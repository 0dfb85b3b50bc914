"""`let-bench report`: one page of what rows say. `let-bench plot`: curves of runs or rows."""

import difflib
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from let_plugin.bench import charts, frame, tables
from let_plugin.bench.charts import Spec
from let_plugin.bench.frame import Estimate, Suite
from let_plugin.bench.rows import BASELINE, CONVERGE, THROUGHPUT, Row
from let_plugin.config.errors import ConfigError, Problem

METRICS = ("loss_metrics/global_avg_loss", "validation_metrics/loss", "let/cosine", "let/lambda", "throughput(tps)")
_TEACHER_SHARE = 0.1  # the paper's: of several teachers the overview shows the one nearest to it


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
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(suites), encoding="utf-8")


def plot(paths: Sequence[Path], out: Path) -> None:
    """Draws curves to `out`, as .html, .svg or .png: metrics of runs, or the held-out losses of convergence rows.

    Args:
        paths: Dump folders of let-train (with a metrics.jsonl), or files of rows.
        out: The file; an older one is replaced.
    """
    problems = _missing_libraries()
    if out.suffix not in (".html", ".svg", ".png"):
        problems.append(Problem("--out", "expected a file that ends in .html, .svg or .png", str(out)))
    logs = [path / "metrics.jsonl" for path in paths if path.is_dir()]
    problems += [
        Problem("RUN", "no metrics.jsonl in this folder", str(log.parent)) for log in logs if not log.is_file()
    ]
    if problems:
        raise ConfigError(problems)
    specs = _metric_charts(logs)
    if files := [path for path in paths if not path.is_dir()]:
        suites = [suite for suite in frame.suites(frame.read(files)) if suite.kind == CONVERGE]
        specs += [charts.losses(frame.curves(suite)) for suite in suites]
    if not specs:
        raise ConfigError(Problem("RUN", "nothing to draw in these", [str(path) for path in paths]))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".html":
        out.write_text(_page(title="Curves", figures=specs, suites=[]), encoding="utf-8")
    else:
        charts.save(specs, out)


def render(suites: Sequence[Suite]) -> str:
    """The page as HTML. Everything in it that comes from rows is escaped."""
    gains = sorted((suite for suite in suites if suite.kind == CONVERGE), key=lambda suite: suite.time)
    costs = [suite for suite in suites if suite.kind == THROUGHPUT]
    sections = [_section(suite, number, suite in gains[-1:]) for number, suite in enumerate(suites)]
    return _page(
        title="LET: what it brings and what it costs",
        figures=[charts.losses(frame.curves(suite)) for suite in gains[-1:]],
        gains=_html(gain_overview(gains[-1])) if gains else "",
        gain_words=gain_words(gains[-1]) if gains else "",
        costs=_html(cost_overview(costs)) if costs else "",
        cost_words=cost_words(costs),
        suites=sections,
    )


def gain_overview(suite: Suite) -> pd.DataFrame:
    """What LET brings, as cells of text: the difference to the baseline of each method, and its speed-up."""
    cells = tables.table(suite)[[f"less {BASELINE}", "speed-up, tokens"]].drop(index=BASELINE)
    cells["verdict"] = [_verdict(suite.frame["difference"][label], 0, "better", "worse") for label in cells.index]
    return cells


def gain_words(suite: Suite) -> str:
    lets = [label for label, other, _ in suite.comparisons if other == BASELINE and label.startswith("let")]
    if not lets:
        return ""
    best = min(lets, key=lambda label: suite.frame["difference"][label].value)
    said = []
    for label, other, estimate in suite.comparisons:
        if label == best:
            verdict = _verdict(estimate, 0, "better", "worse")
            how = {"better": "lower than", "worse": "higher than"}.get(
                verdict, "no different, as far as these runs tell, from"
            )
            said.append(f"{how} that of {other}")
    control = "; against the controls at its weight, which know nothing of the teacher, it is " if said[1:] else ""
    numbers = f"{suite.frame['difference'][best].text('+.4f')} nats per token"
    return f"The final loss of {best} is {said[0]} ({numbers}){control}{', '.join(said[1:])}."


def cost_overview(suites: Sequence[Suite]) -> pd.DataFrame:
    """What LET costs, as cells of text: a line per suite, with the teacher nearest to a tenth of the student."""
    lines = {}
    for suite in suites:
        active, stopped = _nearest(suite, "active"), _nearest(suite, "stopped")
        if active is None and stopped is None:
            continue
        memory = next(name for name in suite.frame if name.endswith(" / plain"))
        lines[suite.name] = {
            "teacher / student": "" if active is None else f"{active['share']:.0%}",
            "step time / plain": "" if active is None else active["step_time"].text(".3f"),
            "its bound": "" if active is None else f"{active['flop_bound']:.3f}",
            "memory / plain": "" if active is None else active[memory].text(".3f"),
            "its bound ": "" if active is None else f"{_memory_bound(suite, active):.3f}",
            "step time after the stop": "" if stopped is None else stopped["step_time"].text(".3f"),
            "memory after the stop": "" if stopped is None else stopped[memory].text(".3f"),
            "device": suite.rows[0]["device_name"],
        }
    return pd.DataFrame(lines).T.rename_axis(columns="question")


def cost_words(suites: Sequence[Suite]) -> str:
    said = []
    latest = sorted(suites, key=lambda suite: suite.time)
    active_of = {
        suite.rows[0]["device_name"]: line for suite in latest if (line := _nearest(suite, "active")) is not None
    }
    for device, active in active_of.items():
        teacher = f"a teacher of {active['share']:.0%} of the student"
        time, bound = _percent(active["step_time"]), f"{active['flop_bound'] - 1:+.1%}"
        said.append(f"On {device} {teacher} changes the time of a step by {time}; its FLOPs alone are {bound}.")
    stopped = [line for suite in suites if (line := _nearest(suite, "stopped")) is not None]
    if stopped:
        best = min((line["step_time"] for line in stopped), key=lambda e: math.inf if e.low is None else e.high - e.low)
        verdict = _verdict(best, 1, "faster", "slower")
        said.append(f"After the stop a step takes {best.text('.4f')} times as long as a plain one: {verdict}.")
    return " ".join(said)


def _section(suite: Suite, number: int, is_above: bool) -> dict[str, Any]:
    """What the template shows of a suite."""
    figures: list[Spec] = []
    if suite.kind == CONVERGE and not is_above:
        figures.append(charts.losses(frame.curves(suite)))
    others = suite.frame[~suite.frame["is_baseline"]] if suite.kind == THROUGHPUT else suite.frame
    if suite.kind == THROUGHPUT and len(others):
        figures.append(charts.ratios(others, "step_time", dict(others["flop_bound"]), "step time / plain"))
        memory = next(name for name in suite.frame if name.endswith(" / plain"))
        bounds = {label: _memory_bound(suite, line) for label, line in others.iterrows()}
        figures.append(charts.ratios(others, memory, bounds, f"{memory.partition(' ')[0]} memory / plain"))
    configs = {row["label"]: row["config"] for row in suite.rows}
    (first, config), *rest = configs.items()
    return {
        "anchor": f"suite-{number}",
        "name": suite.name,
        "words": tables.verdicts(suite) if suite.kind == CONVERGE else [],
        "figures": figures,
        "table": _html(tables.table(suite)),
        "notes": [*tables.notes(suite), *tables.choices(suite)],
        "profiles": [(caption, _html(cells)) for caption, cells in map(tables.profile_table, suite.profiles)],
        "sources": _sources(suite.rows),
        "configs": [(first, config), *((label, _changes(config, own, first, label)) for label, own in rest)],
    }


def _sources(rows: Sequence[Row]) -> list[str]:
    times = sorted(row["time"] for row in rows)
    commits = sorted({f"{row['commit']}{' (changed since)' if row['dirty'] else ''}" for row in rows})
    versions = {", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in rows}
    when = f"{len(rows)} runs from {times[0]} to {times[-1]}, commit {', '.join(commits)}"
    return [f"{when}, with {'; '.join(sorted(versions))}.", *dict.fromkeys(row["command"] for row in rows)]


def _changes(config: str, own: str, first: str, label: str) -> str:
    """What `own` has that `config` has not, as a diff."""
    lines = difflib.unified_diff(config.splitlines(), own.splitlines(), first, label, lineterm="", n=1)
    return "\n".join(lines) or f"that of {first}"


def _metric_charts(logs: Sequence[Path]) -> list[Spec]:
    lines = []
    for log in logs:
        for line in map(json.loads, log.read_text().splitlines()):
            known = {name: line[name] for name in METRICS if line.get(name) is not None and math.isfinite(line[name])}
            lines += [
                {"run": log.parent.name, "step": line["step"], "name": name, "value": v} for name, v in known.items()
            ]
    found = pd.DataFrame(lines, columns=["run", "step", "name", "value"])
    return [charts.metric(found[found["name"] == name], name) for name in METRICS if (found["name"] == name).any()]


def _page(**content: Any) -> str:
    import jinja2
    import vl_convert

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("let_plugin.bench", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja")
    library = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub says that a snippet is required
    return page.render(content, library=library, light=charts.LIGHT, axes=charts.AXES)


def _html(cells: pd.DataFrame) -> str:
    return cells.to_html(border=0)


def _nearest(suite: Suite, case: str) -> pd.Series | None:
    lines = [line for _, line in suite.frame[suite.frame["case"] == case].iterrows()]
    return min(lines, key=lambda line: abs(line["share"] - _TEACHER_SHARE), default=None)


def _memory_bound(suite: Suite, line: pd.Series) -> float:
    """In multiples of plain's peak."""
    kind = next(name for name in suite.frame if name.endswith(" / plain")).partition(" ")[0]
    return 1 + line["memory_bound"] / (line[kind] - line["more_memory"])


def _verdict(estimate: Estimate, null: float, below: str, above: str) -> str:
    if estimate.low is None:
        return "one pair"
    return "not resolved" if estimate.contains(null) else below if estimate.value < null else above


def _percent(ratio: Estimate) -> str:
    interval = (
        "" if ratio.low is None or ratio.high is None else f" (95 %: {ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"
    )
    return f"{ratio.value - 1:+.1%}{interval}"


def _missing_libraries() -> list[Problem]:
    return [
        Problem("let-bench", f'needs {name}; pip install "let-plugin[bench]"')
        for name in ("jinja2", "scipy", "vl_convert")
        if find_spec(name) is None
    ]
