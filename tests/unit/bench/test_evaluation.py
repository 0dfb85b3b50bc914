"""lm-eval's scores, and what is refused before it is asked."""

import pytest

from let_plugin.bench import evaluation
from let_plugin.config.errors import ConfigError


def test_scores_by_metric_without_what_is_no_score():
    result = {
        "alias": "piqa",
        "acc,none": 0.61,
        "acc_stderr,none": 0.01,
        "exact_match,strict": 1,
        "exact_match_stderr,strict": "N/A",
        "sample_len": 12,
    }
    assert evaluation.scores_of(result) == {"acc": 0.61, "acc_stderr": 0.01, "exact_match (strict)": 1.0}


def test_the_main_score_is_the_accuracy_where_there_is_one():
    assert evaluation.main_score({"acc_norm": 0.2, "acc": 0.1}) == 0.1
    assert evaluation.main_score({"perplexity": 15.0, "perplexity_stderr": 1.0}) == 15.0


def test_the_papers_nine():
    assert len(set(evaluation.TASKS)) == 9


def test_all_that_is_wrong_is_named(tmp_path):
    pytest.importorskip("lm_eval", reason="pip install let-plugin[eval]")
    wrong = {"num_fewshot": -1, "limit": 0, "batch_size": 0, "max_length": 1, "include_path": tmp_path / "missing"}
    with pytest.raises(ConfigError) as caught:
        evaluation.Options(out=tmp_path, **wrong).check()
    names = [problem.key for problem in caught.value.problems]
    assert names == ["--num-fewshot", "--limit", "--batch-size", "--max-length", "--include-path", "--out"]
    evaluation.Options(out=tmp_path / "rows.jsonl").check()
