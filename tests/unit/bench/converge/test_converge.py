"""From a command line to a suite: in which order it runs, what of it is left, and what is chosen."""

import json
import math
from collections import Counter

import pytest

from let_plugin.bench import cli, rows, tables
from let_plugin.bench.converge import run as converge
from let_plugin.bench.processes import RunFailedError

# Final validation loss of a run without a process: LET is best at 1, rkd at 0.1; standard is 4.
LOSSES = {"standard": 4.0, "let@0.1": 3.9, "let@1": 3.7, "rkd@0.1": 3.95, "rkd@1": 4.2, "random_teacher@1": 4.1}


@pytest.fixture
def suite(config_file, options, monkeypatch):
    """`let-bench converge` with runs that take no time; returns (labels with seeds in their order, the table)."""
    order = []

    def execute(run, folder, num_processes):
        order.append((run.label, run.seed))
        if len(order) == suite.dies_at:
            raise KeyboardInterrupt
        loss = LOSSES[run.label] + 0.001 * run.seed
        losses = [loss + 1, loss + 0.5, loss]
        if (run.label, run.seed) in suite.diverging:
            losses[1:] = [math.nan, math.nan]
        return {
            "curve": {
                "step": [1, 2, 4],
                "active_steps": [0, 0, 0],
                "seconds": [0.1, 0.2, 0.4],
                "validation_loss": losses,
                "test_loss": [0.01 + value for value in losses],
            },
            "wall_seconds": 1.0,
            "device_name": "a CPU",
            "num_threads": 1,
            "peak_memory_bytes": {"resident": 2**20},
            "peak_is_of_training": True,
            "preparation": {"what": "nothing", "flops": 0.0, "tokens": 0, "seconds": 0.0},
        }

    monkeypatch.setattr(converge, "execute", execute)

    def suite(**changes):
        order.clear()
        text = converge.run(config_file, [], options(**changes), "let-bench converge x")
        return list(order), text

    suite.dies_at, suite.order, suite.diverging = None, order, set()
    return suite


def test_the_grid_first_then_each_method_with_one_seed_after_the_other(suite, options, capsys):
    order, text = suite(weights=[0.1, 1.0])
    assert order[:4] == [("let@0.1", 2), ("let@1", 2), ("rkd@0.1", 2), ("rkd@1", 2)]
    methods = ["standard", "let@1", "rkd@0.1", "random_teacher@1"]
    assert order[4:] == [(name, seed) for seed in (0, 1) for name in methods]
    out = capsys.readouterr().out
    assert "[4/12] tuning, rkd@1, seed 2: validation 4.2020, test 4.2120" in out and "[12/12] result, " in out
    assert "let: weight 1, by the validation loss (seed 2) of 0.1: 3.9020, 1: 3.7020" in text
    assert "let@1 is better than standard, significantly: -0.3000" in text
    found = rows.read(options().out)
    assert Counter(row["kind"] for row in found) == {"converge": 12, "converge_choice": 2}
    assert Counter(row.get("role") for row in found) == {"tuning": 4, "result": 8, None: 2}
    assert suite(weights=[0.1, 1.0]) == ([], text)  # all there
    assert rows.read(options().out) == found


def test_a_killed_suite_goes_on_with_what_is_missing(suite, options):
    whole, text = suite(weights=[0.1, 1.0])
    options().out.unlink()
    suite.dies_at = 7
    with pytest.raises(KeyboardInterrupt):
        suite(weights=[0.1, 1.0])
    suite.dies_at = None
    assert suite(weights=[0.1, 1.0]) == (whole[6:], text)


def test_more_is_added_to_what_is_there(suite, options):
    suite(methods=["let@1"])
    order, _ = suite(methods=["let@1", "rkd@1"], seeds=[0, 1, 2])
    assert order == [("rkd@1", 0), ("rkd@1", 1), ("standard", 2), ("let@1", 2), ("rkd@1", 2)]
    # A tuning seed that is also one of the results': the same run.
    order, _ = suite(methods=["let"], weights=[1.0, 0.1], tuning_seeds=[0])
    assert order == [("let@0.1", 0)]
    assert len({row["suite"] for row in rows.read(options().out)}) == 1


def test_a_weight_that_diverges_is_not_chosen(suite, options):
    suite.diverging = {("let@1", 2)}
    order, text = suite(weights=[0.1, 1.0], methods=["let", "rkd"])
    assert {("let@0.1", 0), ("rkd@0.1", 0)} < set(order) and ("let@1", 0) not in order
    assert "let: weight 0.1, by the validation loss (seed 2) of 0.1: 3.9020 (diverged: 1); at the end of" in text
    assert suite(weights=[0.1, 1.0], methods=["let", "rkd"]) == ([], text)
    suite.diverging |= {("let@0.1", 2)}
    options().out.unlink()
    with pytest.raises(RunFailedError, match="'let' has diverged at each weight of the grid; take smaller ones"):
        suite(weights=[0.1, 1.0])
    assert len(rows.read(options().out)) == 4  # and rkd's, which were run


def test_a_method_of_which_one_seed_diverges_has_no_result(suite, options):
    suite.diverging = {("let@1", 1)}
    order, text = suite(methods=["let@1", "rkd@0.1"])
    assert len(order) == 6
    assert "let@1 has no result: it diverged with seed 1" in text and "let@1 is" not in text
    assert "rkd@0.1 is better than standard" in text
    found = rows.read(options().out)
    assert tables.text([options().out]) == text
    (diverged,) = [row for row in found if row["kind"] == "converge_diverged"]
    assert (diverged["label"], diverged["seed"], diverged["values"], diverged["unit"]) == ("let@1", 1, [2], "step")
    assert suite(methods=["let@1", "rkd@0.1"]) == ([], text)


def test_without_a_baseline_there_is_no_result(suite):
    suite.diverging = {("standard", 0)}
    for num_run in (1, 0):  # called again, it runs nothing
        with pytest.raises(
            RunFailedError, match="'standard' has diverged with seed 0: there is nothing to compare with"
        ):
            suite(methods=["let@1"])
        assert len(suite.order) == num_run


def test_the_command_refuses_with_one_message(config_file, tmp_path, capfd):
    args = ["converge", str(config_file), "--methods", "lett", "--work-dir", str(tmp_path / "work")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*args, "--out", str(tmp_path / "rows.jsonl"), "--seeds", "0", "0"])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("let-bench: 2 problems in the configuration\n  --methods = 'lett': unknown")
    assert not (tmp_path / "work").exists() and not (tmp_path / "rows.jsonl").exists()


def test_the_rows_are_json(suite, options):
    suite(methods=["let@1"], seeds=[0])
    for line in options().out.read_text().splitlines():
        assert json.loads(line)["suite"]
