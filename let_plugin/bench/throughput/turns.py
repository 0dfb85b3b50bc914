"""Runs that take turns: of all that have been started, one at a time makes a step, and then the next one does.

What is compared is then seconds apart instead of minutes, so that a drift of the machine, or what its neighbours do,
affects all alike. Each lap has an order of its own. A connection to each run says when it is its turn: a byte to the
run gives it the turn, a byte back returns it, and a connection that is closed is a run at its end.
"""

import random
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from let_plugin.bench.processes import Running

_HOST = "127.0.0.1"


def take_turns(starts: Sequence[Callable[[str], Running]], seed: int = 0) -> list[dict[str, Any]]:
    """Runs them to their ends, and returns what each has written. RunFailedError if one fails; the others are stopped.

    Each of `starts` starts a run, which makes a `Turn` of the address it is given. `seed` draws the laps' orders.
    """
    runs: list[Running] = []
    connections: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        # A server for each run: they all start at the same time, and it does not matter which is ready first.
        servers = [stack.enter_context(socket.create_server((_HOST, 0))) for _ in starts]

        # Closed after the runs have been stopped: a run takes the end of its connection for an error.
        open_connections = stack.enter_context(ExitStack())
        for start, server in zip(starts, servers, strict=True):
            runs.append(start(f"{_HOST}:{server.getsockname()[1]}"))
            stack.callback(runs[-1].stop)
        for number, (server, run) in enumerate(zip(servers, runs, strict=True)):
            server.settimeout(0.5)  # seconds until a run that has died is noticed
            while number not in connections:
                run.check()
                with suppress(TimeoutError):
                    connections[number] = open_connections.enter_context(server.accept()[0])
        shuffle = random.Random(seed).shuffle
        while connections:
            lap = list(connections.items())
            shuffle(lap)
            for number, connection in lap:
                with suppress(ConnectionError):  # as at its end
                    connection.sendall(b".")
                    if connection.recv(1):
                        continue
                connections.pop(number).close()
                runs[number].result()  # waits for its end, which is not to be in the others' turns
        return [run.result() for run in runs]


class Turn:
    """A run's side: it connects to the address HOST:PORT of the one who gives the turns."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._connection, self._own = socket.create_connection((host, int(port))), b""  # no turn yet

    def take(self) -> None:
        """Gives the turn back, if it has it, and waits for the next one. RuntimeError if there will be none."""
        self._connection.sendall(self._own)
        if not (own := self._connection.recv(1)):
            raise RuntimeError("the benchmark that this run belongs to has ended")
        self._own = own

    def end(self) -> None:
        """There will be no more steps."""
        self._connection.close()
