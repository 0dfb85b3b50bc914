"""`let-bench throughput` and `converge`, end to end on the tiny student."""

import json

import pytest

from let_plugin.bench import rows
from tests.support import jobs


@pytest.mark.slow
def test_throughput(tmp_path, tiny_config):
    """Steps in turn; then the same again."""
    out = tmp_path / "rows.jsonl"
    args = ["throughput", tiny_config, "--pairs", "2", "--steps", "2", "--teacher-share", "10", "--out", out]
    args += ["--cases", "active", "--interleave", "--work-dir", tmp_path / "work", "--training.seq_len", "32"]
    first = jobs.run("let_plugin.bench", *args, OMP_NUM_THREADS="1")

    found = rows.read(out)
    assert [row["label"] for row in found] == 2 * ["plain", "active 10%"]
    for row in found:
        assert row["command"].startswith("let-bench throughput") and row["tokens_per_second"] > 0
        assert len(row["values"]) == 2 and row["peak_memory_bytes"]["resident"] > 0
        assert "seq_len = 32" in row["config"]
    assert "2 pairs on CPU" in first.stdout and "[4/4] pair 2, active 10%: " in first.stdout

    again = jobs.run("let_plugin.bench", *args)
    assert rows.read(out) == found
    assert "has 2 of 2 pairs already" in again.stdout
    assert again.stdout.partition("\ncase ")[2] == first.stdout.partition("\ncase ")[2] != ""  # the same table


@pytest.mark.slow
def test_converge(tmp_path, tiny_config):
    """The plain student, one that grows out of a shallow one, and one on selected documents; then the same again."""
    reference = tmp_path / "reference"
    jobs.make_teacher(reference, with_head=True)
    years = range(1900, 1960)
    texts = [f"In {year} the river flowed to the sea, and {year % 7} old cats were there." for year in years]
    corpus, kept, out = (tmp_path / name for name in ("corpus.jsonl", "kept.jsonl.xz", "rows.jsonl"))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ["--dataloader.dataset", "text_files", "--dataloader.dataset_path", corpus]
    # The teacher is the demo's: what the random reference does not know, it does.
    teacher = ["--let.teacher.spec", "demo_teacher", "--let.teacher.path", ""]
    known = "let_plugin/demo/assets/tokenizer"
    own = f"--let.teacher.spec tiny_teacher --let.teacher.path {reference} --let.teacher.tokenizer_path {known}"
    selection = [tiny_config, "--reference", own, "--out", kept]
    jobs.run("let_plugin.bench.converge.data_selection", *selection, *data, *teacher)

    args = ["converge", tiny_config, *data, "--methods", "gstack", "miniplm", "--seeds", "0", "--selected-text", kept]
    args += ["--gstack-blocks", "2", "--gstack-steps", "2", "--out", out, "--work-dir", tmp_path / "work"]
    args += ["--test-dataset", "let_demo_test", "--training.steps", "2", "--validator.freq", "2"]
    args += ["--validator.steps", "1"]
    first = jobs.run("let_plugin.bench", *args)
    found = rows.read(out)
    assert [row["label"] for row in found] == ["standard", "gstack [2 blocks, 2 steps]", f"miniplm [{kept}]"]
    for row in found:
        assert row["curve"]["step"] == [1, 2] and row["curve"]["tokens"] == [256, 512]
        assert row["peak_memory_bytes"]["resident"] > 0 and row["wall_seconds"] > 0
    plain, grown, selected = found
    # Another start, or other documents; and what they took is in the curve.
    assert len({row["curve"]["test_loss"][0] for row in found}) == 3 and str(kept) in selected["config"]
    assert grown["preparation"]["tokens"] == 512 and selected["preparation"]["tokens"] > 0
    assert 0 < grown["preparation"]["seconds"] < grown["curve"]["seconds"][0]
    for row in (grown, selected):
        assert row["curve"]["flops"][0] == row["preparation"]["flops"] + plain["curve"]["flops"][0]
    log = next((tmp_path / "work").glob("*/gstack-2-blocks-2-steps-seed-0.log")).read_text()
    assert "Loading the checkpoint from" in log and not list((tmp_path / "work").glob("*/*-shallow"))

    again = jobs.run("let_plugin.bench", *args)
    assert rows.read(out) == found and "has 3 of 3 result runs already" in again.stdout
    assert again.stdout.partition("\nmethod ")[2] == first.stdout.partition("\nmethod ")[2] != ""


@pytest.mark.slow
def test_a_run_of_two_processes_is_profiled(tmp_path, tiny_config):
    out, request = tmp_path / "result.json", tmp_path / "request.json"
    settings = {"warmup": 1, "total": 4, "is_active": True, "profile": True}
    content = {"argv": [str(tiny_config)], "out": str(out), "settings": settings}
    request.write_text(json.dumps(content))
    jobs.run("let_plugin.bench.child", request, processes=2, OMP_NUM_THREADS="1")
    result = json.loads(out.read_text())
    assert result["tokens_per_step"] == 2 * 4 * 64 and len(result["step_seconds"]) == 3
    in_teacher = ("matrix products", "attention", "all else")
    assert all(result["parts"][f"teacher: {part}"] > 0 for part in in_teacher)
    assert result["parts"]["teacher: attention mask"] == 0  # it is the student's
    assert result["parts"]["communication"] > 0  # the teacher is sharded
