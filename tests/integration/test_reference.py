"""The single-process run against plain PyTorch: explicit formulas and autograd."""

import pytest
import torch

from tests.support import jobs, reference
from tests.support.config_registry import STUDENT, TEACHER

STEPS, WEIGHT, STOP_STEP, BLOCK = 4, 0.5, 4, 0
LET = {"student_shape": STUDENT, "teacher_shape": TEACHER, "block": BLOCK}


def train_reference(probe, teacher, num_accumulations):
    """Trains from the probe's initial weights on its batches; returns gradients per step, weights, and cosines."""
    weights = {name: p.clone().requires_grad_() for name, p in probe["initial"].items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    gradients, cosines = [], []
    for step in range(STEPS):
        microbatches = probe["batches"][step * num_accumulations : (step + 1) * num_accumulations]
        batch = [torch.cat(parts) for parts in zip(*microbatches, strict=True)]
        weight = WEIGHT * max(0, STOP_STEP - step) / STOP_STEP
        loss, cosine = reference.let_loss(weights, teacher, batch, weight=weight, **LET)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        gradients.append({name: p.grad.clone() for name, p in weights.items()})
        cosines.append(cosine.item())
        optimizer.param_groups[0]["lr"] = probe["lrs"][step]
        optimizer.step()
    return gradients, {name: p.detach() for name, p in weights.items()}, cosines


@pytest.mark.parametrize("num_accumulations", [1, 2])
def test_gradients_weights_and_metrics_equal_the_reference(tmp_path, tiny_config, tiny_teacher, num_accumulations):
    args = ["--training.global_batch_size", str(4 * num_accumulations)]
    probe = jobs.probe(tmp_path / "out", tiny_config, *args)

    gradients, weights, cosines = train_reference(probe, tiny_teacher[1], num_accumulations)

    assert probe["teacher_modules_alive"] > 0  # the alignment ends with the run

    for got, expected in zip(probe["gradients"], gradients, strict=True):
        assert jobs.relative_difference(got, expected) <= 1e-6
    assert jobs.relative_difference(probe["final"], weights) <= 1e-6
    logged = [line["let/cosine"] for line in jobs.metrics(tmp_path / "out")]
    assert logged == pytest.approx(cosines, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", ["full", "selective", "compiled", "compiled and selective"])
def test_wrapped_blocks_get_the_same_gradient(tmp_path, tiny_config, tiny_teacher, wrapping):
    """Activation checkpointing runs a block twice, compilation replaces it: the tap must not care."""
    args = ["--compile.enable"] if "compiled" in wrapping else []
    checkpointing = next((name for name in ("full", "selective") if name in wrapping), "none")
    with tiny_config.open("a") as f:
        f.write(f'\n[activation_checkpoint]\ntype = "{checkpointing}"\n')
    probe = jobs.probe(tmp_path / "out", tiny_config, *args)

    gradients, weights, cosines = train_reference(probe, tiny_teacher[1], 1)

    assert jobs.relative_difference(probe["gradients"][0], gradients[0]) <= 1e-5
    assert jobs.relative_difference(probe["final"], weights) <= 1e-5
    assert [line["let/cosine"] for line in jobs.metrics(tmp_path / "out")] == pytest.approx(cosines, abs=1e-5)


def test_the_comparison_would_notice_a_missing_alignment(tmp_path, tiny_config, tiny_teacher):
    probe = jobs.probe(tmp_path / "out", tiny_config, "--let.weight", "0")
    gradients, _, _ = train_reference(probe, tiny_teacher[1], 1)
    assert jobs.relative_difference(probe["gradients"][0], gradients[0]) > 1e-3
