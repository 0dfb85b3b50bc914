"""What is logged, and the clocks."""

import json
import time

import pytest
import torch
from torchtitan.components.metrics import BaseLogger

from let_plugin.guidance import metrics
from let_plugin.guidance.metrics import DeviceTimer, Disagreement, JsonlLogger, Progress

TRAINING = {"loss_metrics/global_avg_loss": 2.5, "grad_norm": 0.25}
VALIDATION = {"validation_metrics/loss": 2.75}


class Recorder(BaseLogger):
    """Stands where TensorBoard's or W&B's logger stands."""

    def __init__(self):
        self.logged, self.closed = [], False

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def close(self):
        self.closed = True


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_lines_get_the_extra_metrics_and_validation_lines_do_not(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    inner = Recorder()
    before = time.time()
    logger = JsonlLogger(inner, str(path), lambda: {"let/cosine": 0.5})

    logger.log(TRAINING, 3)
    logger.log(VALIDATION, 3)

    lines = read(path)
    assert [before <= line.pop("time") <= time.time() for line in lines] == [True, True]
    assert lines == [{"step": 3, **TRAINING, "let/cosine": 0.5}, {"step": 3, **VALIDATION}]
    assert inner.logged == [(3, {**TRAINING, "let/cosine": 0.5}), (3, VALIDATION)]
    assert "let/cosine" not in TRAINING  # the caller's dictionary is its own
    logger.close()
    assert inner.closed


def test_what_was_logged_is_on_disk_before_the_file_is_closed(tmp_path):
    logger = JsonlLogger(BaseLogger(), str(tmp_path / "metrics.jsonl"), dict)
    logger.log(TRAINING, 1)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1]
    logger.close()


def test_a_resumed_run_continues_its_file_with_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def run(*logged):
        logger = JsonlLogger(BaseLogger(), str(path), dict)
        for line, step in logged:
            logger.log(line, step)
        logger.close()
        return [(line["step"], "grad_norm" in line) for line in read(path)]

    run((TRAINING, 1), (TRAINING, 2), (VALIDATION, 2), (TRAINING, 3))
    with path.open("a") as file:
        file.write('{"step": 4, "ti')  # killed while it wrote
    assert run((TRAINING, 2), (VALIDATION, 2)) == [(1, True), (2, True), (2, False)]
    assert run((VALIDATION, 2), (TRAINING, 3)) == [(1, True), (2, True), (2, False), (3, True)]  # it validates anew


def test_what_is_not_finite_is_written_as_json_has_it(tmp_path):
    logger = JsonlLogger(BaseLogger(), str(tmp_path / "metrics.jsonl"), lambda: {"let/cosine": float("nan")})
    logger.log({**TRAINING, "grad_norm": float("inf")}, 1)
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    (line,) = [json.loads(text, parse_constant=pytest.fail)]
    assert line["let/cosine"] is None and line["grad_norm"] is None


def test_a_rank_that_does_not_write_still_takes_part(tmp_path, monkeypatch):
    """The extra metrics communicate: every rank has to ask for them."""
    monkeypatch.chdir(tmp_path)
    calls = []
    inner = Recorder()
    logger = JsonlLogger(inner, None, lambda: calls.append(1) or {"let/cosine": 0.5})
    logger.log(TRAINING, 1)
    logger.log(VALIDATION, 1)
    logger.close()
    assert len(calls) == 1 and len(inner.logged) == 2
    assert not list(tmp_path.iterdir())


def test_timer_sums_its_regions_and_starts_anew():
    timer = DeviceTimer(torch.device("cpu"))
    start = time.perf_counter()
    for _ in range(2):
        with timer:
            time.sleep(0.02)
    inside = time.perf_counter() - start
    time.sleep(0.05)  # not in a region
    assert 0.04 <= timer.pop() <= inside
    assert timer.pop() == 0


@pytest.fixture
def clock(monkeypatch):
    """A function that sets the time."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_eta_follows_the_pace_since_the_last_logged_step(clock):
    progress = Progress(total_steps=1000)
    assert progress.eta(1) == "-"
    clock(90.0)  # 9 steps of 10 s
    assert progress.eta(10) == "2:45:00"
    clock(100.0)  # then 10 steps of 1 s
    assert progress.eta(20) == "0:16:20"
    clock(101.0)
    assert progress.eta(1000) == "0:00:00"


def test_eta_of_a_step_that_is_logged_twice_is_unknown(clock):
    progress = Progress(total_steps=10)
    progress.eta(5)
    clock(1.0)
    assert progress.eta(5) == "-"
    clock(3.0)
    assert progress.eta(6) == "0:00:08"


def test_validation_is_told():
    told = []
    logger = JsonlLogger(BaseLogger(), None, dict, lambda *args: told.append(args))
    logger.log(TRAINING, 1)
    logger.log(VALIDATION, 2)
    assert told == [(2.75, 2)]


def test_a_lasting_disagreement_is_said_once():
    disagreement = Disagreement()
    values = [-0.5, -0.5, 0.1, -0.1, None, -0.2, -0.3, -0.2, -0.2, -0.9, -0.9, 0.5, *[-0.9] * 9]
    said = [(i, advice) for i, value in enumerate(values) if (advice := disagreement.advice(value))]
    ((i, advice),) = said
    assert i == 8  # the fifth in a row; steps that measure nothing do not count
    assert "-0.200" in advice and "let.stop_step" in advice and "let.weight" in advice
