"""What README and docs/results.md show is what the committed rows say."""

import json
import re
from pathlib import Path

import pytest

from let_plugin.bench import frame, rows, tables
from let_plugin.demo import compare
from tests.support.jobs import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results"

# A line of README -> the row file and the label that it shows.
BRINGS = {
    "LET, weight 0.1 (the paper's)": "let@0.1",
    "LET, a tuned weight (100)": "let@100",
    "logit distillation, a tuned weight that falls": "rkd_linear@10",
    "the recipe": "recipe_linear@10",
    "the recipe, in 400 of 1,000 steps": "short@10",
}
COSTS = {
    "10 % teacher, 2 CPU cores": ("throughput_10_percent", "active 10%"),
    "the same, later": ("throughput_recipe", "active 10%"),
    "distillation from it, then": ("throughput_recipe", "rkd 10%"),
    "10 % teacher, H200, 1.4 B student": ("throughput_h200", "active 10%"),
    "after the stop, 2 CPU cores": ("throughput_after_stop", "stopped"),
}


def cells(name):
    """First cell -> the other cells, of the table between README's markers."""
    table = README.split(f"<!-- {name}: begin -->\n")[1].split(f"\n<!-- {name}: end -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: rest for first, *rest in lines}


def lines_of(file):
    (suite,) = frame.suites(frame.read([RESULTS / f"{file}.jsonl"]))
    return suite.frame


def test_the_demo_result_is_the_recorded_one():
    rows = (RESULTS / "demo.jsonl").read_text().splitlines()
    shown = README.split("<!-- demo result: begin -->")[1].split("<!-- demo result: end -->")[0]
    assert compare.table(json.loads(rows[-1])) in shown


def test_what_it_brings():
    shown, measured = cells("brings"), lines_of("evidence_strong")
    assert shown.keys() == BRINGS.keys()
    for words, label in BRINGS.items():
        line = measured.loc[label]
        speed_up = tables.speed_up(line, "tokens")
        if line["tokens_ratio"] is not None:
            speed_up = line["tokens_ratio"].text(".2f").replace(" ", "x fewer ", 1)
        assert shown[words] == [line["difference"].text("+.3f"), speed_up]


def test_what_it_costs():
    shown = cells("costs")
    assert shown.keys() == COSTS.keys()
    for words, (file, label) in COSTS.items():
        line = lines_of(file).loc[label]
        memory = next(line[name] for name in line.index if name.endswith(" / plain"))
        assert shown[words] == [line["step_time"].text(".3f"), f"{line['flop_bound']:.3f}", memory.text(".3f")]


def test_tables_are_those_of_the_committed_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/results.md").read_text()
    shown = dict(re.findall(r"<!-- let-bench table (\S+) -->\n```\n(.*?)\n```", text, flags=re.S))
    committed = {f"benchmarks/results/{path.name}" for path in RESULTS.glob("*.jsonl")}
    assert set(shown) == committed - {f"benchmarks/results/{name}.jsonl" for name in ("demo", "learning_rate")}
    for file, table in shown.items():
        assert table == tables.text([Path(file)])
    for row in rows.read(RESULTS / "learning_rate.jsonl"):  # four suites of one run, in words
        assert f" {row['final_validation_loss']:.3f}" in text


def test_no_word_is_spelled_with_s():
    """One spelling, -ize."""
    british = re.compile(r"(?:al|el|er|im|mar|lar|or|an|en|in|on|dom|nt|gn)is(?:e[sdr]?|ing|ations?)\b", re.IGNORECASE)
    folders = (ROOT / name for name in ("let_plugin", "tests", "docs", "benchmarks", "train_configs"))
    files = [*ROOT.glob("*.md"), *(file for folder in folders for file in folder.rglob("*.*[dlya]"))]
    texts = {file: file.read_text() for file in files if file.suffix in (".py", ".md", ".toml", ".jinja")}
    found = {word for text in texts.values() for word in british.findall(text)}
    assert british.search("parallel" + "ised") and len(texts) > 200 and not found


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:train_configs|docs|benchmarks|tests|let_plugin)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
