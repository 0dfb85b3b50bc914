"""One run after the other, each in a process of its own, and how long the rest will take."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from let_plugin.config.errors import Problem

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class Request(DataclassInstance, Protocol):
        """What a run is told: a dataclass of JSON values."""

        @property
        def out(self) -> str:
            """Where it writes its result, as JSON; .log and .request.json lie beside it."""


# What torchrun and host.set_up put into the environment: a run gets its own.
_JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Large tensors on the CPU in huge pages, where the kernel has them (torch reads this): in small ones one of two equal
# runs can be slower throughout, by where its pages happen to lie.
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


class RunFailedError(RuntimeError):
    """A run did not end as it should; the message has its last lines and where the rest is."""


class Running:
    """A run that has been started: `python -m MODULE REQUEST.json`, by torchrun if it is more than one process.

    Args:
        module: What to run.
        request: What it is told.
        what: Names it, for messages.
        num_processes: Of the run.
    """

    def __init__(self, module: str, request: "Request", *, what: str, num_processes: int) -> None:
        self._what = what
        self._out = Path(request.out)
        self._log = self._out.with_suffix(".log")
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.unlink(missing_ok=True)
        file = self._out.with_suffix(".request.json")
        file.write_text(json.dumps(asdict(request)))
        launcher = [sys.executable, "-m"]
        if num_processes > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m"]
        environment = {key: value for key, value in os.environ.items() if key not in _JOB_VARIABLES}
        environment.setdefault(_HUGE_PAGES, "1")
        with self._log.open("w") as stream:
            command = [*launcher, module, str(file)]
            self._process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)

    def check(self) -> None:
        """RunFailedError if it has ended."""
        if self._process.poll() is not None:
            self._fail()

    def stop(self) -> None:
        """Ends it, if it is still there."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def result(self) -> dict[str, Any]:
        """What it has written, once it has ended. RunFailedError if it failed, or wrote nothing."""
        self._process.wait()
        if self._process.returncode != 0 or not self._out.exists():
            self._fail()
        return json.loads(self._out.read_text())

    def _fail(self) -> NoReturn:
        code = self._process.returncode
        how = f"failed with exit code {code}" if code else "ended before its last step; is there enough data?"
        last_lines = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        raise RunFailedError(f"{self._what!r} {how}\n{last_lines}\nall of it: {self._log}")


def run_module(module: str, request: "Request", *, what: str, num_processes: int) -> dict[str, Any]:
    """Runs it to its end (see Running), and returns what it has written. RunFailedError if it fails."""
    return finish(Running(module, request, what=what, num_processes=num_processes))


def finish(run: Running) -> dict[str, Any]:
    """Waits for its end, and returns what it has written (see `Running.result`). An interruption ends the run."""
    try:
        return run.result()
    finally:
        run.stop()


def launch_problems(out: Path, work: Path) -> list[Problem]:
    """What is wrong with where a suite is to write (--out, --work-dir), and with where it was started."""
    problems = []
    for option, path in (("--out", out), ("--work-dir", work)):
        if path.exists() and path.is_dir() != (option == "--work-dir"):
            problems.append(Problem(option, "a folder; expected a file" if path.is_dir() else "a file", str(path)))
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append(Problem("--processes", "started under torchrun; start let-bench alone, and it starts them"))
    return problems


def slug(label: str) -> str:
    """`label` as a file name, the end of it if it is long."""
    return re.sub(r"[^\w.]+", "-", label)[-100:].strip("-")


class Progress:
    """Says what is done and how long the rest will take: each run as long as the last one of its label.

    Args:
        labels: Of the runs to come, in order.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._left = list(labels)
        self._num = len(labels)
        self._seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def expect(self, labels: Sequence[str]) -> None:
        """Other runs than it was thought are still to come."""
        self._num += len(labels) - len(self._left)
        self._left = list(labels)

    def after(self, message: str, num_more: int = 0) -> None:
        """The next of the runs has ended, and `num_more` that ran beside it: the time is shared out."""
        now = time.monotonic()
        took = (now - self._started) / (1 + num_more)
        self._started += took
        self._seconds[self._left.pop(0)] = took
        average = sum(self._seconds.values()) / len(self._seconds)
        left = round(sum(self._seconds.get(label, average) for label in self._left))
        eta = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        print(f"[{self._num - len(self._left)}/{self._num}] {message} ({took:.0f} s; {eta} left)", flush=True)
