"""Runs, each in a process of its own."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# What torchrun and host.set_up put into the environment: a run gets its own.
_JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Puts large CPU tensors into huge pages, where the kernel has them (torch reads this). With small pages, one of two
# equal runs can be slower throughout, depending on where its pages happen to lie.
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_GRACE_SECONDS = 40.0  # between SIGTERM and SIGKILL; torchrun itself gives its processes 30


class RunFailedError(RuntimeError):
    """A run failed. The message has the last lines of its log, and where the log is."""


class Running:
    """`python -m MODULE ARGS` in a process of its own, under torchrun for more than one process.

    It writes its result to `out`, as JSON; the log lies beside it. `what` is its name, for messages.
    """

    def __init__(self, module: str, args: Sequence[str], out: Path, *, what: str, num_processes: int) -> None:
        self._what, self._out, self._log = what, out, out.with_suffix(".log")
        launcher = [sys.executable, "-m"]
        if num_processes > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m"]
        environment = {_HUGE_PAGES: "1"} | {k: value for k, value in os.environ.items() if k not in _JOB_VARIABLES}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        with self._log.open("w") as log:
            # A process group of its own, to be killed as a whole. Ctrl-C then reaches let-bench only, which stops it.
            streams: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
            self._process = subprocess.Popen([*launcher, module, *args], env=environment, process_group=0, **streams)

    def check(self) -> None:
        """RunFailedError if it has ended."""
        if self._process.poll() is not None:
            self._fail()

    def stop(self) -> None:
        """Ends it, if it is still there: by SIGTERM, and after a while by SIGKILL, with all that it has started."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def result(self) -> dict[str, Any]:
        """What it has written at its end; an interruption ends it. RunFailedError if it failed or wrote nothing."""
        try:
            self._process.wait()
        finally:
            self.stop()
        if self._process.returncode != 0 or not self._out.exists():
            self._fail()
        return json.loads(self._out.read_text())

    def _fail(self) -> NoReturn:
        code = self._process.returncode
        how = f"failed with exit code {code}" if code else "ended before its last step; is there enough data?"
        last_lines = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        raise RunFailedError(f"{self._what!r} {how}\n{last_lines}\nall of it: {self._log}")


def slug(label: str) -> str:
    """`label` as a file name; of a long one the beginning, and a hash."""
    name = re.sub(r"[^\w.]+", "-", label).strip("-")
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:12]}"
