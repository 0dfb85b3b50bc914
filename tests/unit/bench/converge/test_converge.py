"""From a command line to a suite: in which order it runs, what of it is left, and what is chosen."""

import math
import multiprocessing
import sys
from collections import Counter

import pytest

from let_plugin.bench import rows, tables
from let_plugin.bench.converge import run
from let_plugin.bench.processes import RunFailedError
from let_plugin.bench.runs import Run

# Final validation loss of a run without a process: LET is best at 1, rkd at 0.1; standard is 4.
LOSSES = {"standard": 4.0, "let@0.1": 3.9, "let@1": 3.7, "rkd@0.1": 3.95, "rkd@1": 4.2, "random_teacher@1": 4.1}
TUNED = "--grid let.weight 0.1 1 --methods let rkd random_teacher --name why?"


class Converge:
    """`let-bench converge` with runs that take no time: `order` has the label and seed of those of the last call."""

    def __init__(self, parsed):
        self._parsed = parsed
        self.order, self.dies_at, self.diverging, self.meeting = [], None, set(), None

    def __call__(self, text):
        self.order = []
        args, options = self._parsed("converge", f"--test-dataset let_demo_test --seeds 0 1 --tuning-seeds 2 {text}")
        table = run.run(args, options, "let-bench converge x")
        return self.order, table

    def execute(self, suite, own):
        name = own.label, own.details["seed"]
        self.order.append(name)
        if self.meeting:  # with another process, once
            self.meeting.wait(60)
            self.meeting = None
        if len(self.order) == self.dies_at:
            raise KeyboardInterrupt
        loss = LOSSES[own.label] + 0.001 * own.details["seed"]
        losses = [loss + 1, loss + 0.5, loss]
        if name in self.diverging:
            losses[1:] = [math.nan, math.nan]
        curve = {"step": [1, 2, 4], "active_steps": [0, 1, 2], "seconds": [0.1, 0.2, 0.4], "validation_loss": losses}
        return {
            "curve": curve | {"test_loss": [0.01 + value for value in losses]},
            "wall_seconds": 1.0,
            "device_name": "a CPU",
            "num_threads": 1,
            "peak_memory_bytes": {"resident": 2**20},
            "peak_is_of_training": True,
            "preparation": own.details["preparation"],
        }


@pytest.fixture
def converge(parsed, monkeypatch):
    made = Converge(parsed)
    monkeypatch.setattr(run.Suite, "_execute", lambda suite, own: made.execute(suite, own))
    return made


def test_the_grid_first_then_each_method_with_one_seed_after_the_other(converge, path, capsys):
    """Killed at a run of the grid, then at one of the results; each time it goes on with what is missing."""
    ran = []
    for converge.dies_at in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            converge(TUNED)
        ran += converge.order[:-1]
    converge.dies_at = None
    order, text = converge(TUNED)
    ran += order
    assert ran[:4] == [("let@0.1", 2), ("let@1", 2), ("rkd@0.1", 2), ("rkd@1", 2)]
    names = ["standard", "let@1", "rkd@0.1", "random_teacher@1"]
    assert ran[4:] == [(name, seed) for seed in (0, 1) for name in names]
    said = capsys.readouterr().out
    assert "tuning, rkd@1, seed 2: validation 4.2020, test 4.2120" in said and "result, " in said
    assert "let: weight 1, by the validation loss (seed 2) of 0.1: 3.9020, 1: 3.7020" in text
    assert "let@1" in text and "-0.3000" in text
    found = rows.read(path)
    assert Counter(row["kind"] for row in found) == {"converge": 12, "converge_choice": 2}
    assert Counter(row.get("role") for row in found) == {"tuning": 4, "result": 8, None: 2}
    assert all(row["suite"] and row["let_train"].startswith("let-train ") for row in found if row["kind"] == "converge")
    assert {row["name"] for row in found} == {"why?"} and converge(TUNED) == ([], text)  # all there
    assert rows.read(path) == found


def test_more_is_added_to_what_is_there(converge, path):
    converge("--methods let@1")
    converge("--methods let@1 rkd@1 --seeds 0 1 2")
    assert converge.order == [("rkd@1", 0), ("rkd@1", 1), ("standard", 2), ("let@1", 2), ("rkd@1", 2)]
    # A tuning seed that is also one of the results': the same run.
    converge("--methods let --grid let.weight 1 0.1 --tuning-seeds 0")
    assert converge.order == [("let@0.1", 0)]
    assert len({row["suite"] for row in rows.read(path)}) == 1


def test_processes_share_a_suite(converge, path, monkeypatch):
    """Each run is made once, whoever makes it. Those of seed 0 that were run to tune are results as well."""
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.01)
    converge.meeting = multiprocessing.Barrier(2)
    own = f"{TUNED} --tuning-seeds 0"
    other = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(len(converge(own)[0])))
    other.start()
    order, _ = converge(own)
    other.join()
    assert 0 < len(order) < 10 and other.exitcode + len(order) == 10
    assert Counter(row.get("role") for row in rows.read(path)) == {"tuning": 4, "result": 8, None: 2}


def test_a_weight_that_diverges_is_not_chosen(converge, path):
    converge.diverging = {("let@1", 2)}
    order, text = converge("--grid let.weight 0.1 1 --methods let rkd")
    assert {("let@0.1", 0), ("rkd@0.1", 0)} < set(order) and ("let@1", 0) not in order
    assert "let: weight 0.1, by the validation loss (seed 2) of 0.1: 3.9020 (diverged: 1); at the end of" in text
    converge.diverging |= {("let@0.1", 2)}
    path.unlink()
    with pytest.raises(RunFailedError, match="'let' has diverged at each point of the grid; take smaller values"):
        converge(TUNED)
    assert len(rows.read(path)) == 4  # and rkd's, which were run


def test_a_method_of_which_one_seed_diverges_has_no_result(converge, path):
    converge.diverging = {("let@1", 1)}
    order, text = converge("--methods let@1 rkd@0.1")
    assert len(order) == 6
    assert "let@1 has no result: it diverged with seed 1" in text and "Against standard: better: rkd@0.1." in text
    assert tables.text([path]) == text
    (diverged,) = [row for row in rows.read(path) if row["kind"] == "converge_diverged"]
    assert (diverged["label"], diverged["seed"], diverged["values"], diverged["unit"]) == ("let@1", 1, [2], "step")
    assert converge("--methods let@1 rkd@0.1") == ([], text)


def test_without_a_baseline_there_is_no_result(converge):
    converge.diverging = {("standard", 0)}
    for num_run in (1, 0):  # called again, it runs nothing
        with pytest.raises(RunFailedError, match="'standard' has diverged with seed 0: there is nothing to compare"):
            converge("--methods let@1")
        assert len(converge.order) == num_run


def test_a_row_counts_the_preparation_and_the_active_steps(converge):
    details = {"seed": 3, "tokens_per_step": 256, "step_flops": 5.0, "active_flops": 0.5}
    own = Run(label="let@1", argv=(), config="", settings={}, details=details | {"preparation": {}})
    before = {"what": "stored states", "flops": 70.0, "tokens": 9, "seconds": 10.0}
    made = run.observed(own, converge.execute(None, own) | {"preparation": before})
    assert made["curve"]["flops"] == [75, 80.5, 91]
    assert made["curve"]["tokens"] == [256, 512, 1024] and made["curve"]["seconds"] == [10.1, 10.2, 10.4]
    assert made["final_validation_loss"] == pytest.approx(3.703)
    assert made["values"] == [made["final_test_loss"]] == [pytest.approx(3.713)]
    assert (made["active_steps"], made["unit"]) == (2, "nats/token")
