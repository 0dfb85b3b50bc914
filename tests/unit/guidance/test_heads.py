"""Losses at the student's head, in whole steps against plain PyTorch; `test_strategies.py` has several processes."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from let_plugin.alignment.divergences import Divergence
from let_plugin.alignment.tap import LogitTap
from let_plugin.config import LetConfig, PairConfig, TermConfig
from let_plugin.guidance import distillation, heads
from let_plugin.guidance.controls import without_knowledge
from let_plugin.guidance.guidance import Guidance
from tests.support import jobs, reference
from tests.support.config_registry import STUDENT, TEACHER_DIM, tiny, tiny_padded
from tests.support.fields import set_all
from tests.support.probe import full


def expected(trainer, batch, added, own_share_BL=1.0):
    """Gradients of L_NLL, each token's times its share, + 0.5 * `added`, and the latter, by autograd.

    `added` is a function of the weights, the outputs of the blocks and the logits.
    """
    (part,) = trainer.model_parts
    params = {name: full(p).requires_grad_() for name, p in part.named_parameters()}
    inputs, labels_BL = batch
    hidden, final_BLD = reference.llama(params, inputs["input"], inputs["positions"], **STUDENT)
    logits_BLV = final_BLD @ params["lm_head.weight"].T
    more = added(params, hidden, logits_BLV)
    own_BL = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="none").view_as(labels_BL)
    valid_BL = labels_BL != reference.IGNORE_INDEX
    ((own_BL * own_share_BL).sum() / valid_BL.sum() + 0.5 * more).backward()
    return {name: p.grad for name, p in params.items()}, more.item()


def metrics_of_step(trainer, guidance, batch, gradients):
    """Takes a step of lambda = 0.5, which must have these gradients, and returns what it has measured."""
    trainer.guidance, trainer.step = guidance, 1
    assert all(progress.start_step(0) for progress in trainer.terms)
    guidance.start_step(measures=True)
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
    config.let.signal, config.let.student_block = "labels", 1
    trainer = request.getfixturevalue("trainer")

    def auxiliary(params, hidden, logits_BLV):
        logits_BLV = reference.rms_norm(hidden[1], params["norm.weight"]) @ params["lm_head.weight"].T
        return F.cross_entropy(logits_BLV.flatten(0, 1), batch[1].flatten())

    gradients, loss = expected(trainer, batch, auxiliary)
    guidance = Guidance(trainer, trainer.terms, 0)
    assert guidance.teacher is None
    metrics = metrics_of_step(trainer, guidance, batch, gradients)
    assert metrics["let/auxiliary_loss"] == pytest.approx(loss, rel=1e-5) and "let/grad_cosine" in metrics


def divergence(kind, q, p):
    """Between two predictions, as the definition says."""
    if kind == "jensen_shannon":
        middle = (p + q) / 2
        return (divergence("forward_kl", middle, p) + divergence("forward_kl", middle, q)) / 2
    p, q = (q, p) if kind == "reverse_kl" else (p, q)
    return (p * (p.log() - q.log())).sum(-1)


def bucketed(predictions_V, is_top_V):
    return torch.cat([predictions_V[is_top_V], predictions_V[~is_top_V].sum()[None]])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2.0},
        {"compiled": True},
        {"divergence": "reverse_kl", "alpha": 0.75},
        {"divergence": "jensen_shannon", "temperature": 0.5, "top_k": 3},
        {"top_k": 50, "alpha": 1.0, "teacher__rows": 0.5},
        {"control": "random_teacher"},
        {"divergence": "reverse_kl", "padded": True},  # of the two heads, one has padded rows
        {"top_k": 50, "padded": True},
        {"top_k": 3, "teacher__spec": "padded_teacher"},
    ],
    ids=str,
)
def test_the_students_predictions_are_drawn_to_the_teachers(
    config, batch, request, settings, monkeypatch, padded_teacher
):
    """Over the 4,096 rows that both heads have; others have the gradient of the student's own loss alone."""
    monkeypatch.setattr(distillation, "MAX_LOGITS", 4096 * 5)  # five tokens at a time
    settings = dict(settings)
    if settings.pop("compiled", False):
        set_all(config, compile__enable=True, compile__backend="aot_eager")
    config.model_spec = (tiny_padded if settings.pop("padded", False) else tiny)().model_spec
    set_all(config.let, signal="logits", **settings)
    config.let.teacher.path = f"{config.dump_folder}/teacher"
    weights = jobs.make_teacher(config.let.teacher.path, with_head=True, spec=config.let.teacher.spec)
    trainer = request.getfixturevalue("trainer")
    guidance = Guidance(trainer, trainer.terms, 0)
    let, rows = config.let, slice(0, 1 if "teacher__rows" in settings else 2)
    states_BLE = guidance.teacher(batch[0]["input"], batch[0]["positions"])
    head_VE = without_knowledge({"head": weights["lm_head.weight"]}, let.control)["head"][:4096]
    p_BLV = F.softmax(states_BLE @ head_VE.T / let.temperature, -1)
    has_target_BL = torch.zeros_like(batch[1], dtype=torch.bool)
    has_target_BL[rows] = batch[1][rows] != reference.IGNORE_INDEX

    def added(params, hidden, logits_BLV):
        q_BLV = F.softmax(logits_BLV[..., :4096] / let.temperature, -1)
        total = 0.0
        for q, p in zip(q_BLV[has_target_BL], p_BLV[has_target_BL], strict=True):
            if let.top_k:
                is_top_V = p >= p.topk(let.top_k).values[-1]
                q, p = bucketed(q, is_top_V), bucketed(p, is_top_V)
            total = total + let.temperature**2 * divergence(let.divergence, q, p)
        return total / has_target_BL.sum()

    gradients, loss = expected(trainer, batch, added, 1 - let.alpha * has_target_BL.float())
    batches = list(guidance.counted(iter([batch])))
    metrics = metrics_of_step(trainer, guidance, batches[0], gradients)
    assert metrics["let/distillation_loss"] == pytest.approx(loss, rel=1e-4)
    assert {"let/teacher_tokens_per_second", "let/grad_cosine"} < metrics.keys() and "let/cosine" not in metrics
    (tap,) = guidance.signals[0].taps
    assert tap.num_calls == {LogitTap.PLACE: 8} and tap._target is None  # the chunks of torchtitan's loss


def test_several_terms_are_added_up(config, batch, request, headed_teacher):
    """One block has two of them; the teacher runs once for all of its layers, as deep as is still needed."""
    states = TermConfig(weight=0.4, pairs=[PairConfig(student=1, teacher=0), PairConfig(student=2, teacher=0)])
    terms = [states, TermConfig(signal="labels", weight=0.3, student_block=1), TermConfig(signal="logits", weight=0.2)]
    config.let = LetConfig(enable=True, terms=terms, teacher=config.let.teacher)
    config.let.teacher.path, weights = str(headed_teacher[0]), headed_teacher[1]
    trainer = request.getfixturevalue("trainer")
    guidance = Guidance(trainer, trainer.terms, 0)
    width, states_BLE = TEACHER_DIM, guidance.teacher(batch[0]["input"], batch[0]["positions"])
    valid_BL = batch[1] != reference.IGNORE_INDEX

    def added(params, hidden, logits_BLV):
        early_BLV = reference.rms_norm(hidden[1], params["norm.weight"]) @ params["lm_head.weight"].T
        total = 0.3 * F.cross_entropy(early_BLV.flatten(0, 1), batch[1].flatten())
        target_BLD = F.interpolate(states_BLE[..., :width], size=hidden[0].shape[-1], mode="linear")
        for block in (1, 2):
            cosine_BL = F.cosine_similarity(hidden[block], target_BLD, dim=-1)
            total = total - 0.4 * (cosine_BL * valid_BL).sum() / valid_BL.sum()
        p_BLV = F.softmax(states_BLE[..., width:] @ weights["lm_head.weight"].T, -1)
        kl_BL = divergence("forward_kl", F.softmax(logits_BLV, -1), p_BLV)
        return 2 * (total + 0.2 * (kl_BL * valid_BL).sum() / valid_BL.sum())

    gradients, _ = expected(trainer, batch, added)
    metrics = metrics_of_step(trainer, guidance, batch, gradients)
    assert {key: metrics[key] for key in metrics if key.endswith("lambda")} == pytest.approx(
        {"let.states/lambda": 0.4, "let.labels/lambda": 0.3, "let.logits/lambda": 0.2}
    )
    assert {"let.states/cosine/1-0", "let.labels/auxiliary_loss", "let.logits/grad_ratio"} < metrics.keys()
    guidance.end([guidance.signals[1]])  # the labels'; it leaves nothing behind, and the others stay
    assert not any("labels" in name for name, _ in trainer.model_parts[0].named_buffers())
    deep = weakref.ref(guidance.teacher)
    guidance.end([guidance.signals[1]])  # that alone needed the teacher's second block
    assert deep() is None and len(guidance.teacher.model.layers) == 1
    assert torch.equal(guidance.teacher(batch[0]["input"], batch[0]["positions"]), states_BLE[..., :width])


def test_microbatches_weigh_as_much_as_they_have_tokens(config, batch, request, headed_teacher):
    """Two of 4 and 60 valid labels have the gradient of both at once."""
    set_all(config.let, signal="logits", alpha=0.5)
    config.let.teacher.path = str(headed_teacher[0])
    trainer = request.getfixturevalue("trainer")
    inputs, labels_BL = batch[0], batch[0]["input"].roll(-1, dims=1)
    labels_BL[0, 4:] = labels_BL[1, 60:] = reference.IGNORE_INDEX
    rows = [({name: x[i : i + 1] for name, x in inputs.items()}, labels_BL[i : i + 1]) for i in range(2)]
    found = []
    for microbatches in ([(inputs, labels_BL)], rows):
        trainer.optimizers.zero_grad()
        trainer.guidance, trainer.step = Guidance(trainer, trainer.terms, 0), 1
        trainer.terms[0].start_step(0)
        trainer.guidance.start_step()
        for input_dict, own_labels_BL in microbatches:
            counts = torch.tensor(64)
            trainer.forward_backward_step(input_dict=input_dict, labels=own_labels_BL, global_valid_tokens=counts)
        trainer.guidance.end()
        found.append({name: full(p.grad) for name, p in trainer.model_parts[0].named_parameters()})
    assert jobs.relative_difference(*found) <= 1e-6


@pytest.mark.parametrize(("kind", "top_k"), [("forward_kl", None), ("reverse_kl", 1), ("jensen_shannon", 65)])
def test_a_divergence_of_odd_shapes_and_of_classes_that_one_model_lacks(kind, top_k):
    """By autograd of the definition, in fp64; the likeliest may be classes that count as one."""
    generator = torch.Generator().manual_seed(0)
    student_TV, teacher_TV = (torch.randn(5, 65, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    student_TV.requires_grad_()
    q_TV, p_TV = ((x[:, :61] / 3).softmax(-1) for x in (student_TV, teacher_TV))
    if top_k == 1:
        is_top_TV = p_TV == p_TV.amax(-1, keepdim=True)
        q_TV, p_TV = (torch.stack([bucketed(*row) for row in zip(x, is_top_TV, strict=True)]) for x in (q_TV, p_TV))
    losses_T = 9 * divergence(kind, q_TV, p_TV)
    (gradient_TV,) = torch.autograd.grad(losses_T.sum(), student_TV)
    got_T, got_TV = Divergence(kind, 3.0, top_k)(student_TV.float(), teacher_TV.float(), torch.arange(65) < 61)
    torch.testing.assert_close(got_T.double(), losses_T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got_TV.double(), gradient_TV, rtol=1e-5, atol=1e-7)
