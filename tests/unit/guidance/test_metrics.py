"""What is logged, and the clocks."""

import json
import time

import pytest
from torchtitan.components.metrics import BaseLogger

from let_plugin.guidance import metrics
from let_plugin.guidance.metrics import Disagreement, JsonlLogger, Progress

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


def test_training_lines_get_the_extra_metrics_and_validation_lines_do_not(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    inner, told = Recorder(), []
    extra = {"let/cosine": 0.5}
    logger = JsonlLogger(inner, str(path), lambda: extra, lambda *args: told.append(args))

    logger.log(TRAINING, 3)
    logger.log(VALIDATION, 3)
    logger.log({"loss_metrics/global_avg_loss": float("inf"), "grad_norm": float("nan")}, 4)

    # On disk before the file is closed; JSON has no number that is not finite.
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert all(line.pop("time") <= time.time() for line in lines)
    assert lines[:2] == [{"step": 3, **TRAINING, **extra}, {"step": 3, **VALIDATION}]
    assert lines[2] == {"step": 4, "loss_metrics/global_avg_loss": None, "grad_norm": None, **extra}
    assert inner.logged[:2] == [(3, {**TRAINING, **extra}), (3, VALIDATION)]
    assert told == [(2.75, 3)]
    logger.close()
    assert inner.closed


def test_a_resumed_run_continues_its_file_with_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def run(*logged):
        logger = JsonlLogger(BaseLogger(), str(path), dict)
        for line, step in logged:
            logger.log(line, step)
        logger.close()
        return [(line["step"], "grad_norm" in line) for line in map(json.loads, path.read_text().splitlines())]

    run((TRAINING, 1), (TRAINING, 2), (VALIDATION, 2), (TRAINING, 3))
    with path.open("a") as file:
        file.write('{"step": 4, "ti')  # killed while it wrote
    assert run((TRAINING, 2), (VALIDATION, 2)) == [(1, True), (2, True), (2, False)]
    assert run((VALIDATION, 2), (TRAINING, 3)) == [(1, True), (2, True), (2, False), (3, True)]  # it validates anew


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


def test_eta_follows_the_pace_since_the_last_logged_step(monkeypatch):
    progress = Progress(total_steps=1000)
    # 9 steps of 10 s, then 10 steps of 1 s, and a step that is logged twice.
    expected = {(1, 0.0): "-", (10, 90.0): "2:45:00", (20, 100.0): "0:16:20", (20, 101.0): "-"}
    for (step, now), eta in expected.items():
        monkeypatch.setattr(metrics.time, "monotonic", lambda now=now: now)
        assert progress.eta(step) == eta


def test_a_lasting_disagreement_is_said_once():
    disagreement = Disagreement()
    values = [-0.5, -0.5, 0.1, -0.1, None, -0.2, -0.3, -0.2, -0.2, -0.9, -0.9, 0.5, *[-0.9] * 9]
    said = [(i, advice) for i, value in enumerate(values) if (advice := disagreement.advice(value))]
    ((i, advice),) = said
    assert i == 8  # the fifth in a row; steps that measure nothing do not count
    assert "-0.200" in advice and "let.stop_step" in advice and "let.weight" in advice
