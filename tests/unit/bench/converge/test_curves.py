"""What a suite writes, the report reads; anything else is named."""

import pytest

from let_plugin.bench import rows
from let_plugin.bench.converge import curves
from let_plugin.config.errors import ConfigError
from tests.support import synthetic_rows


@pytest.fixture
def row(tmp_path):
    synthetic_rows.converge(tmp_path / "rows.jsonl", seeds=1, methods={"let@1": 2.0})
    return rows.read(tmp_path / "rows.jsonl")[0]


def test_a_run_comes_back_as_it_was_written(row):
    run = curves.read(row)
    assert (run.method, run.seed, run.suite, run.role) == ("let@1", 0, "c", "result")
    assert len(run.curve) == 20 and run.curve[-1].tokens == 200_000
    assert run.final["test_loss"] == run.curve[-1].test_loss == row["values"][0]
    assert run.details().items() <= row.items()


def test_a_list_of_evaluations_is_a_curve_as_well(row):
    columns = row["curve"]
    points = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert curves.read(row | {"curve": points}) == curves.read(row)


def test_the_method_names_a_row_without_a_label(row):
    del row["label"]
    assert curves.read(row).method == "let@1"


def test_a_loss_that_was_not_evaluated_is_left_out(row):
    row["curve"]["test_loss"][0] = None
    assert len(curves.read(row).losses("test_loss", "tokens")) == 19
    assert len(curves.read(row).losses("validation_loss", "seconds")) == 20


def test_all_that_is_wrong_is_named(row):
    row["curve"]["flops"][3] = "many"
    row["curve"]["step"][1] = 5
    wrong = row | {"label": 3, "final_test_loss": "low", "peak_memory_bytes": [1]}
    with pytest.raises(ConfigError) as caught:
        curves.read(wrong)
    fields = [problem.key.partition(": ")[2] for problem in caught.value.problems]
    assert fields == ["method", "curve[3]", "curve", "final_test_loss", "peak_memory_bytes"]


@pytest.mark.parametrize("curve", [None, {}, [], {"step": [1, 2], "tokens": [1]}, 3])
def test_no_curve(row, curve):
    with pytest.raises(ConfigError, match="curve"):
        curves.read(row | {"curve": curve})
