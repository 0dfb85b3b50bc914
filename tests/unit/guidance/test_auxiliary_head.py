"""The control without a teacher, against plain PyTorch; `test_strategies.py` has it on several processes."""

import pytest
import torch
import torch.nn.functional as F

from let_plugin.guidance import heads
from let_plugin.guidance.guidance import Guidance
from tests.support import reference
from tests.support.config_registry import STUDENT
from tests.support.probe import full


@pytest.fixture
def config(config):
    config.let.target = "labels"
    config.let.student_block = 1
    return config


def expected(trainer, batch, weight):
    """Gradients of L_NLL + weight * (cross-entropy of block 1 through norm and head), and that cross-entropy."""
    (part,) = trainer.model_parts
    params = {name: full(p).requires_grad_() for name, p in part.named_parameters()}
    inputs, labels_BL = batch
    hidden, final_BLD = reference.llama(params, inputs["input"], inputs["positions"], **STUDENT)
    losses = []
    for normed_BLD in (final_BLD, reference.rms_norm(hidden[1], params["norm.weight"])):
        logits_BLV = normed_BLD @ params["lm_head.weight"].T
        losses.append(F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten()))
    (losses[0] + weight * losses[1]).backward()
    return {name: p.grad for name, p in params.items()}, losses[1].item()


@pytest.mark.parametrize("chunk", [2048, 50])
def test_block_norm_and_head_learn_from_both_losses(trainer, batch, chunk, monkeypatch):
    monkeypatch.setattr(heads, "_CHUNK", chunk)
    gradients, loss = expected(trainer, batch, 0.5)
    guidance = Guidance(trainer, 0)
    assert guidance.teacher is None
    trainer.guidance = guidance
    guidance.start_step(0.5)
    num_valid = (batch[1] != reference.IGNORE_INDEX).sum()
    trainer.forward_backward_step(input_dict=batch[0], labels=batch[1], global_valid_tokens=num_valid)
    for name, parameter in trainer.model_parts[0].named_parameters():
        torch.testing.assert_close(full(parameter.grad), gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    assert guidance.metrics() == {"let/auxiliary_loss": pytest.approx(loss, rel=1e-5)}
    guidance.finish_step()


def test_nothing_is_left_of_it(trainer):
    (part,) = trainer.model_parts
    before = [list(part.state_dict()), len(list(part.buffers())), len(part._forward_pre_hooks)]
    guidance = Guidance(trainer, 0)
    guidance.remove()
    assert [list(part.state_dict()), len(list(part.buffers())), len(part._forward_pre_hooks)] == before
