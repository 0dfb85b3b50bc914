"""What a training step asks of LET, on a real trainer of one process; `test_reference.py` has whole steps."""

import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.guidance.guidance import Guidance
from tests.support.config_registry import TEACHER_DIM

ROWS, LENGTH = 2, 64


def test_the_target_is_the_teachers_state_and_zero_where_the_label_does_not_count(trainer, batch):
    guidance = Guidance(trainer, 0)
    target_BLE = guidance.target(*batch)
    assert target_BLE.shape == (ROWS, LENGTH, TEACHER_DIM) and not target_BLE.requires_grad
    ignored_BL = batch[1] == IGNORE_INDEX
    assert not target_BLE[ignored_BL].any()
    states_BLE = guidance.teacher(batch[0]["input"], batch[0]["positions"])
    assert torch.equal(target_BLE[~ignored_BL], states_BLE[~ignored_BL])


def test_the_target_has_the_teachers_dtype(trainer, batch):
    trainer.config.let.teacher.dtype = "bfloat16"
    trainer.config.let.teacher.center = True
    assert Guidance(trainer, 0).target(*batch).dtype == torch.bfloat16


@pytest.mark.parametrize(("target", "match"), [("teacher", "interpolate"), ("teacher", "linear"), ("labels", "linear")])
def test_nothing_is_left_of_it(trainer, target, match):
    trainer.config.let.target, trainer.config.let.dimension_match = target, match
    trainer.config.checkpoint.enable = True
    part = trainer.model_parts[0]
    states = trainer.checkpointer.states = {}

    def traces():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules())
        named = [[name for name, _ in n] for n in (part.named_buffers(), part.named_parameters())]
        return hooks, list(part.state_dict()), named, list(states)

    before = traces()
    guidance = Guidance(trainer, 0)
    assert traces() != before
    assert list(states) == [projector.name for projector in guidance.projectors]
    assert len(guidance.projectors) == ((target, match) == ("teacher", "linear"))
    assert list(part.state_dict()) == before[1]  # not even while it is there
    part.load_state_dict(part.state_dict(), strict=False)  # as torchtitan loads
    guidance.remove()
    assert traces() == before
    assert guidance.teacher is None
