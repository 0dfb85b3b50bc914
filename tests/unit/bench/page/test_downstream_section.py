"""Scores are shown as lm-eval gave them."""

from let_plugin.bench import rows
from let_plugin.bench.page import downstream_section
from tests.support import synthetic_rows


def test_scores(tmp_path):
    path = tmp_path / "rows.jsonl"
    results = {"piqa": {"acc": 0.61, "acc_stderr": 0.011, "acc_norm": 0.62}}
    for name in ("plain", "let"):
        how = {"num_fewshot": 1, "limit": None, "max_length": 256}
        synthetic_rows.append(path, "eval", [0.61], "score", checkpoint=name, results=results, **how)
    (made,) = downstream_section.sections(rows.read(path))
    assert made.tables[0].lines == [
        ["piqa", "plain", "acc", "0.6100 \N{PLUS-MINUS SIGN} 0.0110"],
        ["piqa", "plain", "acc_norm", "0.6200"],
        ["piqa", "let", "acc", "0.6100 \N{PLUS-MINUS SIGN} 0.0110"],
        ["piqa", "let", "acc_norm", "0.6200"],
    ]
    assert made.origin.startswith("2 runs")


def test_what_was_evaluated_in_another_way_is_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    for limit, max_length in ((None, 256), (10, 256), (None, 512), (None, 256)):
        details = {"num_fewshot": 1, "limit": limit, "max_length": max_length, "results": {"piqa": {"acc": 0.6}}}
        synthetic_rows.append(path, "eval", [0.6], "score", checkpoint="x", **details)
    (made,) = downstream_section.sections(rows.read(path))
    assert [(table.caption, len(table.lines)) for table in made.tables] == [
        ("Scores, 1 example in the prompt, 256 tokens at most", 2),
        ("Scores, 1 example in the prompt, 256 tokens at most, of the first 10 documents of a task alone", 1),
        ("Scores, 1 example in the prompt, 512 tokens at most", 1),
    ]


def test_nothing_to_show():
    assert downstream_section.sections([]) == []
