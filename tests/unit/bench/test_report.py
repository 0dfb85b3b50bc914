"""The page, and the plots."""

import json
import re

import pytest

from let_plugin.bench import cli, frame, report
from let_plugin.config.errors import ConfigError
from tests.support import synthetic_rows

charts = pytest.importorskip("let_plugin.bench.charts", reason="pip install let-plugin[bench]")


def test_the_page_says_what_rows_say_and_needs_nothing_beside_it(tmp_path):
    path = tmp_path / "a_question.jsonl"
    synthetic_rows.throughput(path, noise=0.01, device_name="<b>device</b>")
    synthetic_rows.throughput(path, pairs=1, suite="t", name="one pair", peak_is_of_measured_steps=False)
    synthetic_rows.profile(path)
    synthetic_rows.converge(path, methods={"standard": 1.0, "let@1": 2.0, "labels@1": 2.5})
    cli.main(["report", str(path), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["a question", "a question", "one pair"]
    assert page.index("let@1 is better than standard, significantly") < page.index("step time / plain")
    assert page.count("<svg") == 3 and "profiled" in page and "steps = 12" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page) and "<script" not in page
    assert "<b>device" not in page and "&lt;b&gt;device" in page


def test_numbers_of_the_figures_are_those_of_the_rows(tmp_path):
    synthetic_rows.converge(tmp_path / "rows.jsonl", methods={"standard": 1.0, "let@1": 2.0})
    synthetic_rows.throughput(tmp_path / "rows.jsonl")
    costs, gains = frame.suites(frame.read([tmp_path / "rows.jsonl"]))[::-1]
    if costs.kind != "throughput":
        costs, gains = gains, costs
    figure = charts.drawn([lambda part: charts.losses(part, frame.curves(gains))])
    tokens, *_ = figure.subfigs[0].axes
    lines = {line.get_label(): line.get_xydata() for line in tokens.lines}
    assert lines["let@1"][-1] == pytest.approx((200_000, 0.398), abs=0.02)
    assert lines["standard"][0][0] == 40_000  # the first fifth is left out
    found, bound = dict(costs.frame["step_time"]), dict(costs.frame["flop_bound"])
    figure = charts.drawn([lambda part: charts.ratios(part, {"step time": (found, bound)})])
    dots = {
        line.get_ydata()[0]: line.get_xdata()[0] for line in figure.subfigs[0].axes[0].lines if line.get_marker() == "o"
    }
    assert dots["active 20%"] == pytest.approx(1.08) and dots["plain"] == 1


@pytest.mark.parametrize("suffix", ["html", "png", "svg"])
def test_plots_of_runs_and_of_rows(tmp_path, suffix):
    for name, loss in (("plain", 5.0), ("let", 4.0)):
        lines = [{"step": s, "loss_metrics/global_avg_loss": loss - s, "let/cosine": float("nan")} for s in (1, 2)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    synthetic_rows.converge(tmp_path / "rows.jsonl")
    out = tmp_path / f"plot.{suffix}"
    cli.main(["plot", *(str(tmp_path / name) for name in ("plain", "let", "rows.jsonl")), "--out", str(out)])
    content = out.read_bytes()
    assert content.startswith({"html": b"<!doctype", "png": b"\x89PNG", "svg": b"<?xml"}[suffix])
    if suffix == "html":
        assert all(word in content for word in (b"plain", b"loss_metrics/global_avg_loss", b"rkd@1"))
        assert b"let/cosine" not in content


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        report.write([tmp_path / "no.jsonl"], tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError) as caught:
        report.plot([tmp_path / "run"], tmp_path / "plot.pdf")
    assert [problem.key for problem in caught.value.problems] == ["--out", "RUN"]
