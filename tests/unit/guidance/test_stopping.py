"""When a run's alignment ends, on a real trainer of one process; `tests/integration` has it on several."""

import pytest

from let_plugin.config import AdaptiveStopConfig, plan
from let_plugin.guidance import stopping
from let_plugin.guidance.stopping import ADAPTIVE_STOP, TermProgress


def progress_of(trainer):
    (term,) = plan.terms(trainer.config.let)
    return TermProgress(trainer, term)


@pytest.fixture
def config(config):
    config.let.stop_step = 4
    config.training.steps = 8
    return config


@pytest.mark.parametrize(
    ("cosines", "steps_taken", "expected"),
    [([-1, -1], 3, 3), ([-1, 1], 3, 4), ([-1, None, -1], 3, 3), ([-1, -1], 6, 4)],  # never later than chosen
)
def test_the_gradients_bring_it_forward(trainer, cosines, steps_taken, expected):
    trainer.config.checkpoint.enable = True
    trainer.checkpointer.states = {}
    trainer.config.let.adaptive_stop = AdaptiveStopConfig(criterion="gradient", patience=2, smoothing=0.0)
    stopping = progress_of(trainer)
    stopping.begin(0)
    for cosine in cosines:
        stopping.after_gradients(cosine, steps_taken)  # counted from 0, it is the next step's number
    assert stopping.step == expected
    assert set(trainer.checkpointer.states) == {ADAPTIVE_STOP}


@pytest.fixture
def measured(monkeypatch):
    """Counts the measurements of the teacher's loss, each of which says 3.0."""
    calls = []
    monkeypatch.setattr(stopping, "measure_teacher_loss", lambda trainer: calls.append(trainer) or 3.0)
    return calls


@pytest.mark.parametrize(
    ("criterion", "teacher_loss", "steps_taken", "num_measured"),
    [
        ("validation", None, 0, 1),
        ("validation", 3.0, 0, 0),
        ("validation", None, 4, 0),  # beyond the stop step
        ("gradient", None, 0, 0),
    ],
)
def test_the_held_out_loss_brings_it_forward_and_the_teachers_is_measured_once_where_it_is_needed(
    trainer, measured, criterion, teacher_loss, steps_taken, num_measured
):
    settings = AdaptiveStopConfig(criterion=criterion, patience=1, teacher_loss=teacher_loss)
    trainer.config.let.adaptive_stop = settings
    stopping = progress_of(trainer)
    for _ in range(2):
        assert not stopping.begin(steps_taken)
    assert len(measured) == num_measured
    if stopping.teacher_loss is not None:
        stopping.after_gradients(-1.0, 1)  # not what it goes by
        stopping.after_validation(3.1, 1)
        assert stopping.step == 4
        stopping.after_validation(2.0, 2)
        assert stopping.step == 2


@pytest.mark.parametrize(("given", "expected"), [(None, 3.0), (2.5, 2.5)])
def test_the_measured_loss_is_in_the_state_and_the_given_one_counts(trainer, measured, given, expected):
    trainer.config.let.adaptive_stop = AdaptiveStopConfig(criterion="validation")
    stopping = progress_of(trainer)
    assert stopping.state_dict()["teacher_loss"].isnan()
    stopping.begin(0)
    trainer.config.let.adaptive_stop = AdaptiveStopConfig(criterion="validation", teacher_loss=given)
    resumed = progress_of(trainer)
    resumed.load_state_dict(stopping.state_dict())
    resumed.begin(1)
    assert resumed.teacher_loss == expected and len(measured) == 1
