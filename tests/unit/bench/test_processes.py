"""What a run finds in its environment, and how it is ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from let_plugin.bench.processes import RunFailedError, Running


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts Python code as a run; `sys.argv[1]` is the file for its result."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(code):
        (tmp_path / "code_of_a_run.py").write_text(f"import json, os, sys, time\n{code}")
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


def wait_until(holds):
    until = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_does_not_wait_for_a_run_that_hangs(tmp_path, monkeypatch):
    """A real SIGINT to a process that waits for a run, as let-bench does. The run ignores SIGTERM, and is killed with
    all that it has started.
    """
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
    pids = tmp_path / "out.json.pids"
    wait_until(lambda: pids.exists() and pids.read_text())
    for _ in range(30):  # Python may lose an interruption, for example in a destructor: then one presses again
        waits.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            waits.wait(2)
            break
    assert waits.poll()
    wait_until(lambda: not any(map(is_running, pids.read_text().split())))


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
