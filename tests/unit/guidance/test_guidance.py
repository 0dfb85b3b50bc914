"""What a training step asks of LET, driven by hand on a real trainer of one process."""

import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.alignment.tap import TARGET_KWARG
from let_plugin.guidance.guidance import Guidance
from let_plugin.guidance.projectors import PROJECTOR
from tests.support.config_registry import STUDENT_DIM, TEACHER_DIM

ROWS, LENGTH = 2, 64


def run_student(trainer, batch, target_BLE):
    """Forward and backward of a loss that is 0: what gradient there is comes from the alignment."""
    inputs, labels_BL = batch
    inputs, _, kwargs = super(type(trainer), trainer).post_dataloading_process(inputs, labels_BL)
    (part,) = trainer.model_parts
    (part(inputs, **kwargs, **{TARGET_KWARG: target_BLE}).sum() * 0).backward()
    return part.layers["0"].attention.wo.weight.grad


def valid_tokens(batch):
    return (batch[1] != IGNORE_INDEX).sum()


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


def test_a_step_adds_lambdas_share_of_the_gradient_and_reports_the_cosine(trainer, batch, monkeypatch):
    guidance = Guidance(trainer, 0)
    gradients = []
    for weight in (0.0, 0.5, 1.0):
        trainer.model_parts[0].zero_grad()
        guidance.start_step(weight)
        with guidance.microbatches(valid_tokens(batch)):
            gradient = run_student(trainer, batch, guidance.target(*batch))
        guidance.finish_step()
        gradients.append(gradient.clone())
    assert not gradients[0].any() and gradients[1].any()
    torch.testing.assert_close(gradients[2], 2 * gradients[1])

    metrics = guidance.metrics()
    assert -1 <= metrics["let/cosine"] <= 1 and metrics["let/cosine"] != 0
    assert metrics["let/teacher_tokens_per_second"] > 0
    monkeypatch.setattr(guidance._timer, "pop", lambda: 0.0)  # no time was measured: the states were stored
    assert guidance.metrics()["let/teacher_tokens_per_second"] == 0


def test_a_step_that_does_not_reach_the_tap_is_an_error(trainer, batch):
    guidance = Guidance(trainer, 0)
    guidance.start_step(1.0)
    with guidance.microbatches(valid_tokens(batch)):
        pass
    with pytest.raises(RuntimeError, match="the tap was not reached"):
        guidance.finish_step()


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


def test_a_projector_learns_from_the_step(trainer, batch):
    trainer.config.let.dimension_match = "linear"
    guidance = Guidance(trainer, 0)
    weight = trainer.model_parts[0].get_parameter(f"{PROJECTOR}_0.weight")
    assert weight.shape == (STUDENT_DIM, TEACHER_DIM)
    guidance.start_step(1.0)
    with guidance.microbatches(valid_tokens(batch)):
        run_student(trainer, batch, guidance.target(*batch))
    assert weight.grad.any()  # where the student's gradients are clipped
    before = weight.detach().clone()
    guidance.finish_step()
    assert not torch.equal(weight, before)
