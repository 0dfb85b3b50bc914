"""Losses at the student's head, against plain PyTorch; `test_strategies.py` has them on several processes."""

import pytest
import torch
import torch.nn.functional as F

from let_plugin.guidance import heads
from let_plugin.guidance.guidance import Guidance
from let_plugin.guidance.heads import distillation
from tests.support import jobs, reference
from tests.support.config_registry import STUDENT
from tests.support.probe import full


def expected(trainer, batch, added):
    """Gradients of L_NLL + 0.5 * `added`, of (weights, outputs of the blocks, logits), and the latter, by autograd."""
    (part,) = trainer.model_parts
    params = {name: full(p).requires_grad_() for name, p in part.named_parameters()}
    inputs, labels_BL = batch
    hidden, final_BLD = reference.llama(params, inputs["input"], inputs["positions"], **STUDENT)
    logits_BLV = final_BLD @ params["lm_head.weight"].T
    more = added(params, hidden, logits_BLV)
    (F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten()) + 0.5 * more).backward()
    return {name: p.grad for name, p in params.items()}, more.item()


def metrics_of_step(trainer, guidance, batch, gradients):
    """Takes a step of lambda = 0.5, which must have these gradients, and returns what it has measured."""
    trainer.guidance, trainer.step = guidance, 1
    guidance.start_step(0.5, measures=True)
    num_valid = (batch[1] != reference.IGNORE_INDEX).sum()
    trainer.forward_backward_step(input_dict=batch[0], labels=batch[1], global_valid_tokens=num_valid)
    for name, parameter in trainer.model_parts[0].named_parameters():
        torch.testing.assert_close(full(parameter.grad), gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    metrics = guidance.metrics()
    guidance.finish_step()
    return metrics


@pytest.mark.parametrize("chunk", [2048, 50])
def test_block_norm_and_head_learn_from_both_losses(config, batch, chunk, monkeypatch, request):
    monkeypatch.setattr(heads, "_CHUNK", chunk)
    config.let.target, config.let.student_block = "labels", 1
    trainer = request.getfixturevalue("trainer")

    def auxiliary(params, hidden, logits_BLV):
        logits_BLV = reference.rms_norm(hidden[1], params["norm.weight"]) @ params["lm_head.weight"].T
        return F.cross_entropy(logits_BLV.flatten(0, 1), batch[1].flatten())

    gradients, loss = expected(trainer, batch, auxiliary)
    guidance = Guidance(trainer, 0)
    assert guidance.teacher is None
    metrics = metrics_of_step(trainer, guidance, batch, gradients)
    assert metrics["let/auxiliary_loss"] == pytest.approx(loss, rel=1e-5) and "let/grad_cosine" in metrics


def logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(("shape", "temperature"), [((1, 2), 0.5), ((5, 7), 1.0), ((3, 65), 4.0)])
def test_value_and_gradient(shape, temperature):
    """Per token t^2 sum_v p (log p - log q); its gradient with respect to the student's logits is t (q - p)."""
    student_TV, teacher_TV = logits(*shape, seed=0).requires_grad_(), logits(*shape, seed=1)
    upstream_T = torch.arange(1.0, shape[0] + 1)
    more_TV = torch.cat([teacher_TV, logits(shape[0], 3, seed=2)], dim=-1)  # rows of one vocabulary alone do not count
    losses_T = distillation(student_TV, more_TV, temperature=temperature)
    (losses_T * upstream_T).sum().backward()
    q, p = F.softmax(student_TV.detach() / temperature, -1), F.softmax(teacher_TV / temperature, -1)
    torch.testing.assert_close(losses_T, temperature**2 * (p * (p.log() - q.log())).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(student_TV.grad, temperature * (q - p) * upstream_T[:, None], rtol=1e-4, atol=1e-6)


def test_the_students_predictions_are_drawn_to_the_teachers(config, batch, request):
    config.let.target, config.let.temperature = "logits", 2.0
    config.let.teacher.path = f"{config.dump_folder}/teacher"
    weights = jobs.make_teacher(config.let.teacher.path, with_head=True)
    trainer = request.getfixturevalue("trainer")
    guidance = Guidance(trainer, 0)
    states_BLE = guidance.teacher(batch[0]["input"], batch[0]["positions"])

    def kl(params, hidden, logits_BLV):
        valid_BL = batch[1] != reference.IGNORE_INDEX
        log_p = F.log_softmax(states_BLE @ weights["lm_head.weight"].T / 2, -1)
        log_q = F.log_softmax(logits_BLV / 2, -1)
        return (4 * (log_p.exp() * (log_p - log_q)).sum(-1) * valid_BL).sum() / valid_BL.sum()

    gradients, divergence = expected(trainer, batch, kl)
    metrics = metrics_of_step(trainer, guidance, batch, gradients)
    assert metrics["let/distillation_loss"] == pytest.approx(divergence, rel=1e-5)
    assert {"let/teacher_tokens_per_second", "let/grad_cosine"} < metrics.keys() and "let/cosine" not in metrics
