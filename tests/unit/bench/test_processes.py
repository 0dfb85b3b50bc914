"""How long the rest will take, what a run finds in its environment, and how it is ended."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from let_plugin.bench import processes
from let_plugin.bench.processes import Progress, RunFailedError, Running, slug


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts Python code as a run; `sys.argv[1]` is the file for its result."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(code):
        (tmp_path / "code_of_a_run.py").write_text(f"import json, os, sys, time\n{textwrap.dedent(code)}")
        out = tmp_path / "out.json"
        return Running("code_of_a_run", [str(out)], out, what="it", num_processes=1)

    return start


STUBBORN = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + ".pids", "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def wait_for(path):
    until = time.monotonic() + 120
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    return path.read_text()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids):
    until = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.05)


def test_a_run_that_ignores_sigterm_is_killed_with_all_that_it_has_started(start, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    run = start(STUBBORN)
    pids = [int(pid) for pid in wait_for(tmp_path / "out.json.pids").split()]
    run.stop()
    wait_for_end(pids)
    run.stop()  # nothing is left to do


def test_ctrl_c_does_not_wait_for_a_run_that_hangs(tmp_path, monkeypatch):
    """A real SIGINT to a process that waits for a run, as let-bench does."""
    (tmp_path / "code_of_a_run.py").write_text(f"import os, sys, time\n{STUBBORN}")
    (tmp_path / "waits.py").write_text(
        "from pathlib import Path\n"
        "from let_plugin.bench import processes\n"
        "processes._GRACE_SECONDS = 0.5\n"
        f"out = Path({str(tmp_path / 'out.json')!r})\n"
        "processes.Running('code_of_a_run', [str(out)], out, what='it', num_processes=1).result()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    waits = subprocess.Popen([sys.executable, str(tmp_path / "waits.py")], stderr=subprocess.DEVNULL)
    pids = [int(pid) for pid in wait_for(tmp_path / "out.json.pids").split()]
    waits.send_signal(signal.SIGINT)
    assert waits.wait(60) != 0
    wait_for_end(pids)


def test_a_run_that_fails_says_why(start):
    with pytest.raises(RunFailedError, match="'it' failed with exit code 1\nout of luck\nall of it: "):
        start("sys.exit('out of luck')").result()
    with pytest.raises(RunFailedError, match="'it' ended before its last step"):
        start("").result()


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_a_run_has_huge_pages_unless_the_user_does_without_and_no_rank_yet(start, monkeypatch, own, expected):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if own is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", own)
    environment = start("json.dump(dict(os.environ), open(sys.argv[1], 'w'))").result()
    assert environment["THP_MEM_ALLOC_ENABLE"] == expected and "RANK" not in environment


def test_the_rest_is_as_long_as_the_last_of_each_label(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    progress = Progress(["a", "b", "a", "b"])
    now[0] = 10.0
    progress.after("first")
    assert capsys.readouterr().out == "[1/4] first (10 s; 0:00:30 left)\n"  # b is not known yet: as the average
    now[0] = 40.0
    progress.after("second")
    assert capsys.readouterr().out == "[2/4] second (30 s; 0:00:40 left)\n"
    progress.expect(["b", "b", "b"])
    now[0] = 80.0
    progress.after("third")
    assert capsys.readouterr().out == "[3/5] third (40 s; 0:01:20 left)\n"


@pytest.mark.parametrize(("label", "expected"), [("let@0.1", "let-0.1"), ("active 2.5% batch 4", "active-2.5-batch-4")])
def test_file_names(label, expected):
    assert slug(label) == expected
