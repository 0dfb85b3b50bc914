"""`let-bench throughput` and `converge`, end to end on the tiny student."""

import json

import pandas as pd
import pytest

from let_plugin.bench import cli, rows, runs
from let_plugin.bench.converge import run as converge
from let_plugin.bench.throughput import suite as throughput
from let_plugin.runtime import data
from tests.support import jobs

pytestmark = pytest.mark.slow


class Forked:
    """A run as let-bench starts it, but forked off with all imported; how it starts them: tests/unit/bench."""

    dies = None  # the name of a run that is broken off, once, when it has done all but hand its result over

    def __init__(self, module, args, out, *, what, num_processes):
        out.unlink(missing_ok=True)
        jobs.run(module, *args, processes=num_processes)
        self._found, self._what = json.loads(out.read_text()), what

    def result(self):
        if Forked.dies == self._what:
            Forked.dies = self._found
            raise KeyboardInterrupt
        return self._found


@pytest.fixture
def bench(tmp_path, tiny_config, monkeypatch):
    """Runs a suite with these arguments: the table, and the rows of its file."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(runs, "Running", Forked)
    data.register()
    files = ["--out", str(tmp_path / "rows.jsonl"), "--work-dir", str(tmp_path / "work")]

    def bench(suite, name, text, **changes):
        args, options = cli.parse([name, str(tiny_config), *files, *text.split()])
        vars(args).update(changes)
        return suite.run(args, options, "let-bench x"), rows.read(tmp_path / "rows.jsonl")

    return bench


def test_throughput(bench, capsys):
    """A pair of runs of two processes each; then the same again."""
    own = "--cases active --steps 2 --teacher-share 10 --training.seq_len 32 --processes 2"
    table, found = bench(throughput, "throughput", own, pairs=1)  # an interval needs two
    assert [row["label"] for row in found] == ["plain", "active 10%"]
    for row in found:
        assert row["let_train"].startswith("let-train ") and row["tokens_per_second"] > 0
        assert row["tokens_per_step"] == 2 * 4 * 32 and "seq_len = 32" in row["config"]
        assert len(row["values"]) == 2 and row["peak_memory_bytes"]["resident"] > 0
    assert "1 pairs on CPU" in table and "pair 1, active 10%: " in capsys.readouterr().out
    assert bench(throughput, "throughput", own, pairs=1) == (table, found)
    assert "has 1 of 1 pairs already" in capsys.readouterr().out


def test_converge(bench, tmp_path):
    """The headline pair of the evidence suite, tiny, and a student that grows out of a shallow one. The recipe's run is
    broken off, and goes on from its last evaluation.
    """
    jobs.make_teacher(tmp_path / "teacher", with_head=True)
    own = "--methods gstack recipe_linear@10 --seeds 0 --gstack-blocks 2 --gstack-steps 2 --test-dataset let_demo_test"
    own += " --training.steps 4 --validator.freq 2 --validator.steps 1 --resumable"
    own += f" --methods-file {jobs.ROOT}/train_configs/evidence/methods.toml --let.teacher.path {tmp_path}/teacher"
    Forked.dies = "recipe_linear-10-seed-0"
    with pytest.raises(KeyboardInterrupt):
        bench(converge, "converge", own)
    table, (plain, grown, recipe) = bench(converge, "converge", own)
    unbroken = pd.DataFrame(Forked.dies["curve"]).to_dict("list")
    assert all(recipe["curve"][name] == unbroken[name] for name in ("step", "validation_loss", "test_loss"))
    assert recipe["active_steps"] == unbroken["active_steps"][-1] == 4
    assert [(at["step"], at["let/grad_ratio"] > 0) for at in recipe["logged"]] == [(1, True), (2, True), (4, True)]
    assert (plain["num_resumptions"], recipe["num_resumptions"]) == (0, 1)
    assert not list((tmp_path / "work" / "dump").glob("*/*/step-*"))
    labels = ["standard", "gstack [gstack_blocks 2, gstack_steps 2]", "recipe_linear@10"]
    for label, row in zip(labels, (plain, grown, recipe), strict=True):
        assert (
            row["label"] == label and row["curve"]["step"] == [1, 2, 4] and row["curve"]["tokens"] == [256, 512, 1024]
        )
        assert row["peak_memory_bytes"]["resident"] > 0 and row["wall_seconds"] > 0
    # Another start, out of the shallow model's checkpoint, and what it took is in the curve.
    assert len({row["curve"]["test_loss"][0] for row in (plain, grown, recipe)}) == 3
    before = grown["preparation"]
    assert before["tokens"] == 512 and 0 < before["seconds"] < grown["curve"]["seconds"][0]
    assert grown["curve"]["flops"][0] == before["flops"] + plain["curve"]["flops"][0]
    assert "One seed: no difference" in table and not list((tmp_path / "work").glob("dump/*/shallow"))
