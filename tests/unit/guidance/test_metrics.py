"""What is logged, and the clocks."""

import json
import time

import pytest
import torch
from torchtitan.components.metrics import BaseLogger

from let_plugin.config import LetConfig, TermConfig, plan
from let_plugin.guidance import metrics
from let_plugin.guidance.metrics import JsonlLogger, StepLines
from let_plugin.runtime.held_out import TEST_LOSS

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


@pytest.mark.parametrize("writes", [True, False])
def test_training_lines_get_the_extra_metrics_and_validation_lines_do_not(tmp_path, writes):
    """On a rank that does not write, too: they communicate."""
    path = tmp_path / "new" / "metrics.jsonl"
    inner, told = Recorder(), []
    extra = {"let/cosine": 0.5}
    logger = JsonlLogger(inner, str(path) if writes else None, lambda: extra, lambda *args: told.append(args))

    logger.log(TRAINING, 3)
    logger.log(VALIDATION, 3)
    logger.log({"loss_metrics/global_avg_loss": float("inf"), "grad_norm": float("nan")}, 4)

    assert inner.logged[:2] == [(3, {**TRAINING, **extra}), (3, VALIDATION)]
    assert told[:2] == [({**TRAINING, **extra}, 3), (VALIDATION, 3)]
    if writes:  # on disk before the file is closed; JSON has no number that is not finite
        lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
        assert all(line.pop("time") <= time.time() for line in lines)
        assert lines[:2] == [{"step": 3, **TRAINING, **extra}, {"step": 3, **VALIDATION}]
        assert lines[2] == {"step": 4, "loss_metrics/global_avg_loss": None, "grad_norm": None, **extra}
    logger.close()
    assert inner.closed and path.exists() == writes


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
    before = path.read_text()
    assert run((TRAINING, 1)) == [(1, True)]  # another run: the file of this one stays
    assert [file.read_text() for file in tmp_path.glob("metrics-*.jsonl")] == [before]


def test_a_line_for_each_logged_step_and_validation(monkeypatch, caplog):
    """9 steps of 10 s, a validation, then 10 steps of 1 s, and a step that is logged twice."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    caplog.set_level("INFO")
    terms = plan.terms(LetConfig(terms=[TermConfig(), TermConfig(signal="logits", name="distil")]))
    lines, more = StepLines(1000, terms), {"throughput(tps)": 1234.5, "memory/max_reserved(GiB)": 1.375}
    of_terms = {"let.states/lambda": 3.0, "let.states/cosine": -0.25}
    of_terms |= {"let.distil/lambda": 0.5, "let.distil/distillation_loss": 7.5}
    logged = [(1, 0.0, of_terms), (10, 90.0, of_terms), (10, 90.0, VALIDATION | {TEST_LOSS: 2.5}), (20, 100.0, {})]
    for step, now, own in [*logged, (20, 101.0, {})]:
        monkeypatch.setattr(metrics.time, "monotonic", lambda now=now: now)
        lines.say(own if VALIDATION.keys() <= own.keys() else TRAINING | more | own, step)
    terms = "states 3       cosine -0.2500  distil 0.5     distillation loss  7.5000"
    rest = "grad norm 0.25   1,234 tokens/s  1.38 GiB  eta"
    assert caplog.messages == [
        f"step    1/1000  loss 2.5000  {terms}  {rest} -",
        f"step   10/1000  loss 2.5000  {terms}  {rest} 2:45:00",
        "step   10/1000  validation loss 2.7500  test loss 2.5000",
        f"step   20/1000  loss 2.5000  states ended  distil ended  {rest} 0:16:20",
        f"step   20/1000  loss 2.5000  states ended  distil ended  {rest} -",
    ]
