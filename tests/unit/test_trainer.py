"""The end of the alignment, in a trainer of one process: what is given back, and what is kept."""

from pathlib import Path

import pytest

from let_plugin.alignment.tap import AlignmentTap
from tests.support import jobs
from tests.support.fields import set_all
from tests.support.leftovers import Leftovers


@pytest.fixture
def validated(config):
    """Three steps, of which the last is without a teacher, and a validation of each."""
    set_all(config, training__steps=3, training__disable_cuda_graphs=False)
    set_all(config, validator__enable=True, validator__freq=1, validator__steps=1)


def test_at_the_end_of_the_alignment_all_that_it_brought_is_gone(validated, trainer):
    """`test_strategies.py` has the other teachers, and all that learns."""
    leftovers = Leftovers(trainer)
    trainer.train()
    assert {"guidance", "teacher parameter model.norm.weight", "tap 0"} <= set(leftovers.watched)
    assert leftovers.alive == []
    assert not trainer.config.training.disable_cuda_graphs  # until then, they were off


def test_a_teacher_that_works_against_the_student_is_spoken_of(request, config, monkeypatch, caplog):
    """Once, as soon as the gradients have pointed apart for as long as it takes; here, for one step."""
    monkeypatch.setattr("let_plugin.trainer._PATIENCE", 1)
    caplog.set_level("WARNING")
    set_all(config, training__steps=8, let__stop_step=8, metrics__log_freq=1)
    trainer = request.getfixturevalue("trainer")
    trainer.train()
    against = [line["step"] for line in jobs.metrics(Path(config.dump_folder)) if line["let/grad_cosine"] < 0]
    said = [record.getMessage() for record in caplog.records if "works against the student" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"LET: step {against[0]}: the teacher works against the student")


def test_a_hook_that_is_lost_is_an_error_in_the_first_step(trainer, monkeypatch):
    """As one inside a compiled region would be."""
    monkeypatch.setattr(AlignmentTap, "_inject", lambda *_: None)
    with pytest.raises(RuntimeError, match="the tap was not reached"):
        trainer.train()
    assert trainer.step == 1
