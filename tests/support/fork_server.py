"""Processes that start with all imported: a server that has imported what jobs need, and forks one off for each.

    python -m tests.support.fork_server FD

Reads one request a line from the socket FD, as JSON: {"module", "args", "env", "cwd", "stdout", "stderr" (files),
"processes", "timeout" (seconds)}, and answers with {"code" (of the first that failed, or 0), "codes" (of all),
"timed_out"}. A rank runs `python -m module args` in a process group of its own, with the environment that torchrun
would give it. If one fails, the others are killed. The server ends, and its job with it, when the other end of the
socket is closed.

It runs no kernel and starts no thread before it forks: a forked process has none of the threads of its parent.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import types
import warnings

PRELOADED = (
    "let_plugin.train",
    "let_plugin.trainer",
    "let_plugin.preflight.checks",
    "scipy.io",  # by `datasets`
    "tests.support.config_registry",
    "tests.support.leftovers",
    "tests.support.matrix",
    "tests.support.probe",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torchtitan.models.llama3.sharding",
    "torchtitan.trainer",
)


class Client:
    """The other end of the server, in the process of the tests."""

    def __init__(self, cwd, env):
        own, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())]
        env = {**env, "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self._server = subprocess.Popen(
            command, cwd=cwd, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._socket = own
        self._lines = own.makefile("r")

    def run(self, request):
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        try:
            answer = self._lines.readline()
        except ConnectionResetError:
            answer = ""
        assert answer, f"the fork server has ended, with exit code {self._server.wait()}"
        return json.loads(answer)

    def close(self):
        self._lines.close()
        self._socket.close()
        self._server.wait()


def serve(connection):
    """Answers requests until there are no more; returns, in a process that was forked off, its (request, rank)."""
    for line in connection.makefile("r"):
        request = json.loads(line)
        port, ranks = _free_port(), []
        for rank in range(request["processes"]):
            pid = os.fork()
            if pid == 0:
                _become_rank(request, rank, port)
                return request
            os.setpgid(pid, pid)  # here too: it may be killed before it gets there
            ranks.append(pid)
        answer = _wait(connection, ranks, time.monotonic() + request["timeout"])
        if answer is None:
            return None
        connection.sendall(json.dumps(answer).encode() + b"\n")
    return None


def _wait(connection, ranks, deadline):
    """Waits for the processes of a job; None if the other end has gone."""
    first, codes, running = 0, [None] * len(ranks), {os.pidfd_open(pid): rank for rank, pid in enumerate(ranks)}
    timed_out = gone = False
    while running:
        ready, _, _ = select.select([connection, *running], [], [], max(0, deadline - time.monotonic()))
        timed_out, gone = timed_out or not ready, gone or connection in ready
        for fd in running.keys() & set(ready):
            rank = running.pop(fd)
            os.close(fd)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(ranks[rank], 0)[1])
            first = first or codes[rank]
            _kill_group(ranks[rank])  # what it may have started and left
        if timed_out or gone or first:
            for fd, rank in running.items():
                codes[rank] = "killed"
                os.close(fd)
                _kill_group(ranks[rank])
                os.waitpid(ranks[rank], 0)
            running.clear()
    return None if gone else {"code": first, "codes": codes, "timed_out": timed_out}


def _kill_group(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _free_port():
    """A port below those that the kernel gives away: nothing else takes it before rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return port


def _become_rank(request, rank, port):
    os.setpgid(0, 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if (num := str(request["processes"])) != "1":
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
        os.environ.update(place, GROUP_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    for name, fd in (("stdout", 1), ("stderr", 2)):
        file = os.open(request[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, fd)
        os.close(file)


def end_at_once():
    """No trainer of this process sleeps in the end "for other ranks to complete"."""
    import torchtitan.trainer

    torchtitan.trainer.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


def _run(request):
    import torch

    if request["processes"] == 1:
        end_at_once()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [request["module"], *request["args"]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # it has been imported, on purpose
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    faulthandler.enable()
    from let_plugin.runtime import host

    host.set_up("cpu")
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in what is forked off"
    gc.collect()
    gc.freeze()  # what is there stays, and its pages are shared
    request = serve(connection)
    connection.close()
    if request is not None:
        _run(request)


if __name__ == "__main__":
    main()
