"""Requests to end, in a trainer of one process; `test_resume.py` and `test_launch.py` have runs that go on later."""

import os
import signal
from types import SimpleNamespace

from let_plugin.runtime import ending


def test_without_checkpoints_it_ends_after_the_step_all_the_same(trainer, monkeypatch, caplog):
    """And a caller's handler of a signal is left to it."""
    seen, log = [], trainer.metrics_processor.logger.log

    def asked_to_end(metrics, step):
        log(metrics, step)
        for number in (*ending.SIGNALS, signal.SIGTERM):  # the same again at once: it is the same request
            signal.raise_signal(number)

    monkeypatch.setattr(trainer.metrics_processor.logger, "log", asked_to_end)
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    trainer.train()
    assert signal.signal(signal.SIGUSR1, signal.SIG_DFL) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert trainer.step == 1 and seen == [signal.SIGUSR1]
    assert "LET: step 1: SIGTERM asks the run to end; nothing is saved of it" in caplog.text


def test_a_second_request_ends_the_process_at_once(parallel_dims, monkeypatch):
    monkeypatch.setattr(ending, "_SAME_REQUEST_SECONDS", 0.0)
    pid = os.fork()
    if pid == 0:
        try:
            with ending.CleanEnd(SimpleNamespace(dataloader=None)):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
