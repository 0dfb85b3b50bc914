"""What a suite still has to measure, from what is in its file; and the runs themselves in tests/integration."""

import dataclasses
from types import SimpleNamespace

import pytest

from let_plugin.bench import rows
from let_plugin.bench.processes import RunFailedError
from let_plugin.bench.runs import Run
from let_plugin.bench.throughput import suite

ORIGIN = rows.provenance()
SETTINGS = {"warmup": 2, "total": 4, "is_active": False}
DETAILS = {"seed": 0, "baseline": "plain"}
RUN = Run(label="plain", argv=("run.json",), config='base = "x"\n', settings=SETTINGS, details=DETAILS)


def test_what_makes_another_suite(parsed, monkeypatch):
    def suite_id(runs, text="", **origin):
        monkeypatch.setattr(rows, "provenance", lambda: ORIGIN | origin)
        args, _ = parsed("throughput", text)
        return suite.Suite(runs, args, "").id

    same = suite_id([RUN])
    assert suite_id([RUN], time="later") == suite_id([RUN], "--pairs 9") == same
    others = [
        suite_id([dataclasses.replace(RUN, config='base = "y"\n')]),
        suite_id([RUN, dataclasses.replace(RUN, label="active")]),
        suite_id([RUN], "--processes 2"),
        suite_id([RUN], "--interleave"),
        suite_id([RUN], code="0000000"),
    ]
    assert len({same, *others}) == 1 + len(others)


RESULT = {"device_name": "d", "wall_seconds": 1.0, "step_seconds": [0.5, 0.5], "tokens_per_step": 8}


@pytest.fixture
def measure(tmp_path, monkeypatch, parsed):
    """`Suite.measure` with runs that take no time; returns the order in which they ran."""

    def start(suite, run, what, turns):
        measure.order.append(f"{run.label}, {what}")
        if len(measure.order) == measure.fails_at:
            raise RunFailedError("out of luck")
        return SimpleNamespace(result=lambda: dict(RESULT))

    monkeypatch.setattr(suite.Suite, "_start_run", start)
    runs = [RUN, dataclasses.replace(RUN, label="active", settings=SETTINGS | {"is_active": True})]

    def measure(pairs, fails_at=None, text=""):
        measure.order, measure.fails_at = [], fails_at
        args, _ = parsed("throughput", text)
        args.pairs = pairs
        suite.Suite(runs, args, "x").measure()
        return measure.order

    measure.out = tmp_path / "rows.jsonl"
    return measure


def test_cases_run_in_turn_and_only_what_is_missing(measure, capsys):
    assert measure(2, text="--name how-much?") == ["plain, pair 1", "active, pair 1", "plain, pair 2", "active, pair 2"]
    assert "pair 2, active: 16 tokens/s, 0.500 s/step" in capsys.readouterr().out
    found = rows.read(measure.out)
    assert {row["name"] for row in found} == {"how-much?"}
    assert [(row["label"], row["pair"]) for row in found] == [("plain", 0), ("active", 0), ("plain", 1), ("active", 1)]
    with pytest.raises(RunFailedError):
        measure(3, fails_at=2)
    # The round that was broken off is measured anew: what is compared is close in time.
    assert measure(4) == ["plain, pair 4", "active, pair 4", "plain, pair 5", "active, pair 5"]
    assert rows.read(measure.out)[:4] == found
    assert measure(4, text="--profile") == ["active, profile"]
    assert measure(2) == measure(4, text="--profile") == []
    assert "has 4 of 4 pairs already" in capsys.readouterr().out
