"""`let-bench throughput`, end to end on the tiny student."""

import json

import pytest

from let_plugin.bench import report, rows
from tests.support import jobs


@pytest.mark.slow
def test_throughput(tmp_path, tiny_config):
    out = tmp_path / "rows.jsonl"
    args = ["throughput", tiny_config, "--pairs", "2", "--steps", "2", "--teacher-share", "10", "--out", out]
    args += ["--cases", "stopped", "features", "rkd", "--work-dir", tmp_path / "work", "--training.seq_len", "32"]
    first = jobs.run("let_plugin.bench", *args, OMP_NUM_THREADS="1")

    found = rows.read(out)
    assert [row["label"] for row in found] == 2 * ["plain", "stopped 10%", "features 10%", "rkd 10%"]
    for row in found:
        assert (
            row["let_train"].startswith("let-train ")
            and row["command"].startswith("let-bench throughput")
            and row["tokens_per_second"] > 0
        )
        assert len(row["values"]) == 2 and row["peak_memory_bytes"]["resident"] > 0
        assert "seq_len = 32" in row["config"] and row["seq_len"] == 32
    bounds = {row["case"]: row["flop_bound"] for row in found}
    assert bounds["stopped"] == bounds["features"] == 0 < 0.1 / 3 < bounds["rkd"]
    assert "stored the teacher's states for features 10%" in first.stdout
    assert "2 pairs on CPU" in first.stdout and "[8/8] pair 2, rkd 10%: " in first.stdout

    report.write([out], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "2 pairs on CPU" in html and html.count("<svg") == 1

    again = jobs.run("let_plugin.bench", *args)
    assert rows.read(out) == found
    assert "has 2 of 2 pairs already" in again.stdout and "stored" not in again.stdout
    assert again.stdout.partition("\ncase ")[2] == first.stdout.partition("\ncase ")[2] != ""  # the same table


@pytest.mark.slow
def test_converge(tmp_path, tiny_config):
    """Two seeds of the plain student and of one that grows out of a shallow one, and the same again."""
    out = tmp_path / "rows.jsonl"
    args = ["converge", tiny_config, "--methods", "gstack", "--seeds", "0", "1", "--gstack-blocks", "2"]
    args += ["--gstack-steps", "2", "--test-dataset", "let_demo_test", "--out", out, "--work-dir", tmp_path / "work"]
    args += ["--training.steps", "2", "--validator.freq", "2", "--validator.steps", "1"]
    first = jobs.run("let_plugin.bench", *args)

    found, gstack = rows.read(out), "gstack [2 blocks, 2 steps]"
    assert [(row["label"], row["seed"]) for row in found] == [(m, s) for s in (0, 1) for m in ("standard", gstack)]
    for row in found:
        assert row["curve"]["step"] == [1, 2] and row["curve"]["tokens"] == [256, 512]
        assert row["peak_memory_bytes"]["resident"] > 0 and row["wall_seconds"] > 0
    plain, grown = found[0], found[1]
    # Another start, and what it took is in the curve.
    assert plain["curve"]["test_loss"][0] != grown["curve"]["test_loss"][0] != found[3]["curve"]["test_loss"][0]
    before = grown["preparation"]
    assert before["tokens"] == 512 and 0 < before["seconds"] < grown["curve"]["seconds"][0]
    assert grown["curve"]["flops"][0] == before["flops"] + plain["curve"]["flops"][0]
    log = next((tmp_path / "work").glob("*/gstack-2-blocks-2-steps-seed-0.log")).read_text()
    assert "Loading the checkpoint from" in log and not list((tmp_path / "work").glob("*/*-shallow"))

    again = jobs.run("let_plugin.bench", *args)
    assert rows.read(out) == found and "has 4 of 4 result runs already" in again.stdout
    assert again.stdout.partition("\nmethod ")[2] == first.stdout.partition("\nmethod ")[2] != ""


@pytest.mark.slow
def test_methods_that_need_something_first(tmp_path, tiny_config):
    """Documents are selected, and a run reads them; another one is taught by a larger teacher."""
    reference = tmp_path / "reference"
    jobs.make_teacher(reference, with_head=True)
    texts = [
        f"In {year} the river flowed to the sea, and {year % 7} old cats were there." for year in range(1900, 1960)
    ]
    corpus, kept, out = (tmp_path / name for name in ("corpus.jsonl", "kept.jsonl.xz", "rows.jsonl"))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ["--dataloader.dataset", "text_files", "--dataloader.dataset_path", corpus]
    known = "let_plugin/demo/assets/tokenizer"
    # The teacher is the demo's: what the random reference does not know, it does.
    teacher = ["--let.teacher.spec", "demo_teacher", "--let.teacher.path", ""]
    own = f"--let.teacher.spec tiny_teacher --let.teacher.path {reference} --let.teacher.tokenizer_path {known}"
    selection = [tiny_config, "--reference", own, "--out", kept]
    jobs.run("let_plugin.bench.converge.data_selection", *selection, *data, *teacher)

    args = ["converge", tiny_config, *data, "--seeds", "0", "--selected-text", kept, "--training.steps", "2"]
    args += ["--methods", "miniplm", "large = rkd --let.teacher.spec demo_teacher --let.teacher.path ''"]
    args += ["--test-dataset", "let_demo_test", "--validator.freq", "2", "--validator.steps", "1"]
    jobs.run("let_plugin.bench", *args, "--out", out, "--work-dir", tmp_path / "work")
    plain, selected, distilled = rows.read(out)
    assert [row["label"] for row in (plain, selected, distilled)] == [
        "standard",
        f"miniplm [{kept}]",
        "large@1",
    ]
    assert selected["preparation"]["tokens"] > 0 and str(kept) in selected["config"]
    flops = [row["curve"]["flops"][-1] for row in (plain, selected, distilled)]
    assert flops[1] == flops[0] + selected["preparation"]["flops"] and flops[2] > flops[0]
    assert len({row["final_test_loss"] for row in (plain, selected, distilled)}) == 3


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
