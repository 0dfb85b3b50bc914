"""What a training step asks of LET, on a real trainer of one process; `test_reference.py` has whole steps."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.alignment.tap import TARGET_KWARG
from let_plugin.guidance.guidance import Guidance
from tests.support import jobs
from tests.support.config_registry import TEACHER_DIM
from tests.support.fields import set_all

ROWS, LENGTH = 2, 64


def test_the_target_is_the_teachers_state_and_zero_where_the_label_does_not_count(trainer, batch):
    guidance = Guidance(trainer, trainer.terms, 0)
    target_BLE = guidance.targets(*batch)[TARGET_KWARG]
    assert target_BLE.shape == (ROWS, LENGTH, TEACHER_DIM) and not target_BLE.requires_grad
    ignored_BL = batch[1] == IGNORE_INDEX
    assert not target_BLE[ignored_BL].any()
    states_BLE = guidance.teacher(batch[0]["input"], batch[0]["positions"])
    assert torch.equal(target_BLE[~ignored_BL], states_BLE[~ignored_BL])


def test_a_weight_may_be_a_share_of_the_students_gradient(request, config):
    """lambda follows the ratios that the steps before have measured; with a momentum of 0, that of the last."""
    set_all(config, let__weight_by="gradient", let__weight_momentum=0.0, let__weight=0.3, let__schedule="constant")
    set_all(config, let__stop_step=4, training__steps=4)
    request.getfixturevalue("trainer").train()
    lines = jobs.metrics(Path(config.dump_folder))
    assert lines[0]["let/lambda"] == pytest.approx(0.3e-6)
    for before, line in pairwise(lines):
        assert line["let/lambda"] == pytest.approx(0.3 * before["let/lambda"] / before["let/grad_ratio"], rel=1e-4)
        assert 0.1 < line["let/grad_ratio"] < 0.9  # about the 0.3 that was asked for: the ratio moves slowly


@pytest.mark.parametrize(("signal", "match"), [("states", "interpolate"), ("states", "linear"), ("labels", "linear")])
def test_nothing_is_left_of_it(trainer, signal, match):
    trainer.config.let.signal, trainer.config.let.dimension_match = signal, match
    trainer.config.checkpoint.enable = True
    part = trainer.model_parts[0]
    states = trainer.checkpointer.states = {}

    def traces():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules())
        named = [[name for name, _ in n] for n in (part.named_buffers(), part.named_parameters())]
        return hooks, list(part.state_dict()), named, list(states)

    before = traces()
    guidance = Guidance(trainer, trainer.terms, 0)
    assert traces() != before
    assert list(states) == ["let_projector_0"] * ((signal, match) == ("states", "linear"))
    assert list(part.state_dict()) == before[1]  # not even while it is there
    part.load_state_dict(part.state_dict(), strict=False)  # as torchtitan loads
    guidance.end()
    assert traces() == before
    assert guidance.teacher is None
