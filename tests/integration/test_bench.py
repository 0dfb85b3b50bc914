"""`let-bench throughput`, end to end on the tiny student."""

import json

import pytest

from let_plugin.bench import page, rows
from tests.support import jobs


@pytest.mark.slow
def test_throughput(tmp_path, tiny_config):
    out = tmp_path / "rows.jsonl"
    args = ["throughput", tiny_config, "--pairs", "2", "--steps", "2", "--teacher-share", "10", "--out", out]
    args += ["--work-dir", tmp_path / "work", "--training.seq_len", "32"]
    first = jobs.run("let_plugin.bench", *args, OMP_NUM_THREADS="1")

    found = rows.read(out)
    assert [row["label"] for row in found] == 2 * ["plain", "active 10%", "stopped 10%"]
    for row in found:
        assert row["command"].startswith("let-bench throughput") and row["tokens_per_second"] > 0
        assert len(row["values"]) == 2 and row["peak_memory_bytes"]["resident"] > 0
        assert "seq_len = 32" in row["config"] and row["seq_len"] == 32
    assert "2 pairs on CPU" in first.stdout and "[6/6] pair 2, stopped 10%: " in first.stdout

    html = page.write([out], tmp_path / "report")[0].read_text()
    assert "2 pairs per case" in html and found[-1]["device_name"] in html

    again = jobs.run("let_plugin.bench", *args)
    assert rows.read(out) == found
    assert "has 2 of 2 pairs already" in again.stdout
    assert again.stdout.partition("\ncase ")[2] == first.stdout.partition("\ncase ")[2] != ""  # the same table


@pytest.mark.slow
def test_a_run_of_two_processes_is_profiled(tmp_path, tiny_config):
    out, request = tmp_path / "result.json", tmp_path / "request.json"
    content = {"config": str(tiny_config), "warmup": 1, "total": 4, "is_active": True, "profile": True}
    request.write_text(json.dumps(content | {"out": str(out)}))
    jobs.run("let_plugin.bench.measure", request, processes=2, OMP_NUM_THREADS="1")
    result = json.loads(out.read_text())
    assert result["tokens_per_step"] == 2 * 4 * 64 and len(result["step_seconds"]) == 3
    assert result["parts"]["teacher forward"] > 0 and result["parts"]["communication"] > 0  # the teacher is sharded
