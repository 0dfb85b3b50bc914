"""The page and the plots, without a browser."""

import json
import re
from itertools import pairwise

import pytest

from let_plugin.bench import cli, report
from let_plugin.config.errors import ConfigError
from tests.support import synthetic_rows

pytest.importorskip("vl_convert", reason="pip install let-plugin[bench]")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = folder / "a_question.jsonl"
    synthetic_rows.throughput(path, noise=0.01, device_name="<b>device</b>", config="a = 1\nb = 2")
    synthetic_rows.profile(path)
    synthetic_rows.converge(path, methods={"standard": 1.0, "let@1": 2.0, "random_teacher@1": 2.0, "labels@1": 2.5})
    cli.main(["report", str(path), "--out", str(folder / "page.html")])
    return (folder / "page.html").read_text()


def test_the_page_answers_first(page):
    first = page[: page.index("<section")]
    assert "<td>-0.3010 [-0.3010, -0.3010]</td>" in first and "<td>10%</td>" in first
    assert "<li>Against labels@1: worse: let@1 (+0.0969" in first
    assert first.count("<table") == 2 and first.count("data-spec=") == 1
    assert re.findall("<h2>(.*?)</h2>", page.partition("</main>")[0]) == ["a question", "a question"]


def test_a_suite_is_named_and_the_newest_of_a_name_is_shown(tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "page.html"
    for suite, name, gain in (("a", "Which weight?", 2.0), ("b", "Which teacher?", 3.0), ("c", "Which weight?", 4.0)):
        synthetic_rows.converge(path, seeds=2, methods={"standard": 1.0, "let@1": gain}, suite=suite, name=name)
    report.write([path], out)
    main, _, _ = out.read_text().partition("</main>")
    assert re.findall("<h2>(.*?)</h2>", main) == ["Which weight?", "Which teacher?"]
    assert "Held-out loss: Which" in main and "2.000x" not in main and "4.000x" in main
    report.plot([path], tmp_path / "plot.svg")
    assert "Which weight?" in (tmp_path / "plot.svg").read_text()


def test_the_page_needs_nothing_beside_it_and_escapes_what_rows_say(page):
    assert len(page.encode()) < 2 * 2**20
    assert not re.search(r"(?:src|href)=\"(?!data:)", page.partition("</main>")[0])
    assert "<b>device" not in page and "&lt;b&gt;device" in page
    assert "a = 1\nb = 2" in page  # the configuration is there


def test_numbers_of_the_figure_are_those_of_the_rows(page):
    (spec,) = re.findall(r'data-spec="figure-1">(.*?)</script>', page)
    values = json.loads(spec)["data"]["values"]
    let = [value for value in values if value["label"] == "let@1"]
    assert let[-1]["tokens"] == 200_000 and let[-1]["loss"] == pytest.approx(0.398, abs=0.02)
    assert let[0]["tokens"] == 40_000  # the first fifth is left out
    places = sorted(value["place"] for value in values if value["place"] is not None)
    assert len(places) == 4 and min(b - a for a, b in pairwise(places)) > 0.01  # names apart


def test_mistakes(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError) as caught:
        report.plot([tmp_path / "run"], tmp_path / "plot.pdf")
    assert [problem.key for problem in caught.value.problems] == ["--out", "RUN"]


@pytest.mark.parametrize("suffix", ["html", "png", "svg"])
def test_plots_of_runs_and_of_rows(tmp_path, suffix):
    for name, loss in (("plain", 5.0), ("let", 4.0)):
        lines = [{"step": s, "loss_metrics/global_avg_loss": loss - s, "let/cosine": float("nan")} for s in (1, 2, 3)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    synthetic_rows.converge(tmp_path / "rows.jsonl", seeds=1)
    out = tmp_path / f"plot.{suffix}"
    cli.main(["plot", *(str(tmp_path / name) for name in ("plain", "let", "rows.jsonl")), "--out", str(out)])
    content = out.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
    else:
        for word in ("plain", "loss_metrics/global_avg_loss", "rkd@1"):
            assert word.encode() in content
        assert b"let/cosine" not in content.split(b"<script>")[0]
