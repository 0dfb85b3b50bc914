"""What a run finds in its environment, and one that writes nothing."""

import time

import pytest

from let_plugin.bench import processes
from let_plugin.bench.processes import RunFailedError, Running


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts Python code as a run; `sys.argv[1]` is the file for its result."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(code):
        (tmp_path / "code_of_a_run.py").write_text(f"import json, os, signal, sys, time\n{code}")
        out = tmp_path / "out.json"
        return Running("code_of_a_run", [str(out)], out, what="it", num_processes=1)

    return start


def test_a_run_that_writes_nothing(start):
    with pytest.raises(RunFailedError, match="'it' ended before its last step"):
        start("").result()


def test_the_environment_of_a_run(start, monkeypatch):
    """It has huge pages unless the user does without, and is no rank yet."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    write = "json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    environment = start(write).result()
    assert environment["THP_MEM_ALLOC_ENABLE"] == "1" and "RANK" not in environment
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert start(write).result()["THP_MEM_ALLOC_ENABLE"] == "0"


def test_long_labels_have_names_of_their_own():
    names = {processes.slug(f"{method}@1 [{'key ' * 40}]") for method in ("let", "rkd")}
    assert len(names) == 2 and all(len(name) <= 100 for name in names) and processes.slug("let@0.1") == "let-0.1"


def test_a_run_that_does_not_end_by_sigterm_is_killed(start, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.1)
    run = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(600)")
    while not (tmp_path / "out.json").exists():
        run.check()
        time.sleep(0.05)
    run.stop()
    with pytest.raises(RunFailedError, match="failed with exit code -9"):
        run.check()
