"""Processes that take turns: the order, their ends, and one that dies."""

import json
from functools import partial

import pytest

from let_plugin.bench.processes import RunFailedError, Running
from let_plugin.bench.throughput.turns import take_turns

# A run of so many steps, which notes each of them in a file.
MODULE = """\
import json, sys, time
from let_plugin.bench.throughput.turns import Turn

request = json.load(open(sys.argv[1]))
turn = Turn(request["turns"])
for step in range(request["steps"]):
    turn.take()
    time.sleep(0.05)  # if another one had the turn as well, it would be in between
    with open(request["order"], "a") as file:
        file.write(f"{request['name']}{step} begins\\n{request['name']}{step} ends\\n")
    if step == request["dies_at"]:
        sys.exit("died")
json.dump(request["name"], open(request["out"], "w"))
turn.end()
time.sleep(0.2)
with open(request["order"], "a") as file:
    file.write(f"{request['name']} leaves\\n")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Takes turns among runs of the given steps, named a, b, ...; returns what came out, and the order."""
    (tmp_path / "steps_of_a_run.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    order = tmp_path / "order"
    order.touch()

    def start(name, steps, dies_at, turns):
        request, out = tmp_path / f"{name}.request.json", tmp_path / f"{name}.json"
        content = {"name": name, "steps": steps, "dies_at": dies_at, "order": str(order), "out": str(out)}
        request.write_text(json.dumps(content | {"turns": turns}))
        return Running("steps_of_a_run", [str(request)], out, what=name, num_processes=1)

    def run(*steps, dies_at=-1):
        starts = [partial(start, name, number, dies_at) for name, number in zip("abc", steps, strict=False)]
        try:
            return take_turns(starts)
        finally:
            run.order = order.read_text().splitlines()

    return run


def laps(order, num_runs):
    """The names of each lap's runs, in their order; every step has been alone."""
    steps = [line.removesuffix(" begins") for line in order if line.endswith(" begins")]
    alone = [line for name in steps for line in (f"{name} begins", f"{name} ends")]
    assert [line for line in order if not line.endswith(" leaves")] == alone
    names = [name[0] for name in steps]
    return [names[i : i + num_runs] for i in range(0, len(names), num_runs)]


def test_one_step_at_a_time_and_each_lap_in_an_order_of_its_own(run):
    assert run(6, 6, 7) == ["a", "b", "c"]
    *order, alone = laps(run.order, 3)
    assert len(order) == 6 and all(sorted(lap) == ["a", "b", "c"] for lap in order) and alone == ["c"]
    assert {lap[0] for lap in order} == {"a", "b", "c"}
    # Who is at its end has left before the next one makes its step.
    for name in "ab":
        end = run.order.index(f"{name}5 ends")
        assert run.order[end + 1] == f"{name} leaves"


def test_a_run_that_dies_stops_the_others(run):
    with pytest.raises(RunFailedError, match="'a' failed with exit code 1\ndied"):
        run(3, 3, dies_at=1)
    assert sorted(laps(run.order, 2)[0]) == ["a", "b"]
    assert "a1 ends" in run.order and "a2 begins" not in run.order and "b2 begins" not in run.order
