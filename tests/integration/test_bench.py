"""`let-bench throughput` and `converge`, end to end on the tiny student."""

import json

import pytest

from let_plugin.bench import cli, rows
from let_plugin.bench.throughput import suite
from let_plugin.runtime import data
from tests.support import jobs


@pytest.mark.slow
def test_throughput(tmp_path, tiny_config, monkeypatch, capsys):
    """A pair whose steps are made in turn; then the same again."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data.register()
    out = tmp_path / "rows.jsonl"
    files = [str(tiny_config), "--out", str(out), "--work-dir", str(tmp_path / "work")]
    own = ["--cases", "active", "--interleave", "--steps", "2", "--teacher-share", "10", "--training.seq_len", "32"]
    args, options = cli.parse(["throughput", *files, *own])
    args.pairs = 1  # an interval needs two
    table = suite.run(args, options, "let-bench throughput x")
    found = rows.read(out)
    assert [row["label"] for row in found] == ["plain", "active 10%"]
    for row in found:
        assert row["let_train"].startswith("let-train ") and row["tokens_per_second"] > 0
        assert len(row["values"]) == 2 and row["peak_memory_bytes"]["resident"] > 0
        assert row["interleaved"] and "seq_len = 32" in row["config"]
    assert "1 pairs on CPU" in table and "[2/2] pair 1, active 10%: " in capsys.readouterr().out
    assert suite.run(args, options, "let-bench throughput x") == table and rows.read(out) == found
    assert "has 1 of 1 pairs already" in capsys.readouterr().out


@pytest.mark.slow
def test_converge(tmp_path, tiny_config):
    """The plain student, and one that grows out of a shallow one."""
    out = tmp_path / "rows.jsonl"
    args = ["converge", tiny_config, "--methods", "gstack", "--seeds", "0", "--gstack-blocks", "2"]
    args += ["--gstack-steps", "2", "--test-dataset", "let_demo_test", "--out", out, "--work-dir", tmp_path / "work"]
    args += ["--training.steps", "2", "--validator.freq", "2", "--validator.steps", "1"]
    done = jobs.run("let_plugin.bench", *args, OMP_NUM_THREADS="1")

    plain, grown = rows.read(out)
    assert [plain["label"], grown["label"]] == ["standard", "gstack [2 blocks, 2 steps]"]
    for row in (plain, grown):
        assert row["curve"]["step"] == [1, 2] and row["curve"]["tokens"] == [256, 512]
        assert row["peak_memory_bytes"]["resident"] > 0 and row["wall_seconds"] > 0
    # Another start, and what it took is in the curve.
    assert plain["curve"]["test_loss"][0] != grown["curve"]["test_loss"][0]
    before = grown["preparation"]
    assert before["tokens"] == 512 and 0 < before["seconds"] < grown["curve"]["seconds"][0]
    assert grown["curve"]["flops"][0] == before["flops"] + plain["curve"]["flops"][0]
    log = next((tmp_path / "work").glob("*/gstack-2-blocks-2-steps-seed-0.log")).read_text()
    assert "Loading the checkpoint from" in log and not list((tmp_path / "work").glob("*/*-shallow"))
    assert "One seed: no difference here can be told from chance" in done.stdout


@pytest.mark.slow
def test_a_run_of_two_processes_is_profiled(tmp_path, tiny_config):
    out, request = tmp_path / "result.json", tmp_path / "request.json"
    settings = {"warmup": 1, "total": 4, "is_active": True, "profile": True}
    content = {"argv": [str(tiny_config)], "out": str(out), "settings": settings}
    request.write_text(json.dumps(content))
    jobs.run("let_plugin.bench.child", request, processes=2, OMP_NUM_THREADS="1")
    result = json.loads(out.read_text())
    assert result["tokens_per_step"] == 2 * 4 * 64 and len(result["step_seconds"]) == 3
    names = {name for name, seconds in result["parts"].items() if seconds > 0}  # the attention mask is the student's
    in_teacher = {f"teacher: {part}" for part in ("matrix products", "attention", "all else")}
    own = {"masking the target", "dimension match, loss, its gradient", "gradient injection"}
    assert names == in_teacher | own | {"communication"}  # the teacher is sharded
    assert sum(result["parts"].values()) < max(result["step_seconds"])
