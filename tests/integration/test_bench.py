"""`let-bench throughput`, end to end on the tiny student."""

import pytest

from let_plugin.bench import rows
from tests.support import jobs


@pytest.mark.slow
def test_throughput(tmp_path, tiny_config):
    out = tmp_path / "rows.jsonl"
    args = ["throughput", tiny_config, "--pairs", "2", "--steps", "2", "--teacher-share", "10", "--profile"]
    args += ["--out", out, "--work-dir", tmp_path / "work", "--training.seq_len", "32"]
    first = jobs.run("let_plugin.bench", *args, OMP_NUM_THREADS="1")

    found = rows.read(out)
    measured, profiles = found[:6], found[6:]
    assert [row["label"] for row in measured] == 2 * ["plain", "active 10%", "stopped 10%"]
    assert [row["kind"] for row in profiles] == ["profile"] and profiles[0]["parts"]["teacher forward"] > 0
    for row in measured:
        assert row["command"].startswith("let-bench throughput") and row["tokens_per_second"] > 0
        assert len(row["values"]) == 2 and row["peak_memory_bytes"]["resident"] > 0
        assert "seq_len = 32" in row["config"] and row["seq_len"] == 32
    assert "2 pairs on CPU" in first.stdout and "active 10%, profiled" in first.stdout

    again = jobs.run("let_plugin.bench", *args)
    assert rows.read(out) == found
    assert "has 2 of 2 pairs already" in again.stdout
    assert again.stdout.split("\n\n", 1)[1] == first.stdout.split("\n\n", 1)[1]  # the same table


@pytest.mark.slow
def test_throughput_of_two_processes(tmp_path, tiny_config):
    out = tmp_path / "rows.jsonl"
    args = ["throughput", tiny_config, "--cases", "active", "--pairs", "2", "--steps", "2", "--processes", "2"]
    args += ["--out", out, "--work-dir", tmp_path / "work"]
    jobs.run("let_plugin.bench", *args, OMP_NUM_THREADS="1")
    assert {(row["num_processes"], row["tokens_per_step"]) for row in rows.read(out)} == {(2, 2 * 4 * 64)}
