"""Scores are shown as lm-eval gave them."""

from let_plugin.bench import rows
from let_plugin.bench.page import downstream_section
from tests.support import synthetic_rows


def test_scores(tmp_path):
    path = tmp_path / "rows.jsonl"
    results = {"piqa": {"acc": 0.61, "acc_stderr": 0.011, "acc_norm": 0.62}}
    for name in ("plain", "let"):
        synthetic_rows.append(path, "eval", [0.61], "score", checkpoint=name, num_fewshot=1, results=results)
    (made,) = downstream_section.sections(rows.read(path))
    assert made.tables[0].lines == [
        ["piqa", "plain", "acc", "0.6100 \N{PLUS-MINUS SIGN} 0.0110"],
        ["piqa", "plain", "acc_norm", "0.6200"],
        ["piqa", "let", "acc", "0.6100 \N{PLUS-MINUS SIGN} 0.0110"],
        ["piqa", "let", "acc_norm", "0.6200"],
    ]
    assert made.origin.startswith("2 runs")


def test_nothing_to_show():
    assert downstream_section.sections([]) == []
