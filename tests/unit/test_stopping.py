"""When a run's alignment ends, on a real trainer of one process; `tests/integration` has it on several."""

import pytest

from let_plugin.config import AdaptiveStopConfig
from let_plugin.stopping import ADAPTIVE_STOP, Stopping


@pytest.fixture
def config(config):
    config.let.stop_step = 4
    config.training.steps = 8
    return config


def test_without_a_criterion_the_step_is_the_one_that_was_chosen(trainer):
    stopping = Stopping(trainer)
    stopping.restore(0)
    stopping.after_gradients(-1.0, 1)
    stopping.after_validation(0.0, 1)
    assert stopping.step == 4
    assert not hasattr(trainer.checkpointer, "states")  # checkpoints are off: there is none to put anything into


@pytest.mark.parametrize(("cosines", "expected"), [([-1, -1], 3), ([-1, 1], 4), ([-1, None, -1], 3), ([1, 1], 4)])
def test_the_gradients_bring_it_forward(trainer, cosines, expected):
    trainer.config.let.adaptive_stop = AdaptiveStopConfig(criterion="gradient", patience=2, smoothing=0.0)
    stopping = Stopping(trainer)
    for cosine in cosines:
        stopping.after_gradients(cosine, 3)  # three steps have been taken: step 3, counted from 0, is the next
    assert stopping.step == expected


def test_it_never_comes_later_than_chosen(trainer):
    trainer.config.let.adaptive_stop = AdaptiveStopConfig(criterion="gradient", patience=1)
    stopping = Stopping(trainer)
    stopping.after_gradients(-1.0, 6)
    assert stopping.step == 4


@pytest.mark.parametrize(("loss", "expected"), [(3.1, 4), (2.9, 1)])
def test_the_held_out_loss_brings_it_forward(trainer, loss, expected):
    settings = AdaptiveStopConfig(criterion="validation", patience=1, teacher_loss=3.0)
    trainer.config.let.adaptive_stop = settings
    stopping = Stopping(trainer)
    stopping.after_gradients(-1.0, 1)  # not what it goes by
    stopping.after_validation(loss, 1)
    assert stopping.step == expected


def test_its_state_is_part_of_the_runs_checkpoint(trainer):
    trainer.config.checkpoint.enable = True
    trainer.checkpointer.states = {}
    trainer.config.let.adaptive_stop = AdaptiveStopConfig(criterion="gradient")
    Stopping(trainer).restore(0)
    assert set(trainer.checkpointer.states) == {ADAPTIVE_STOP}
