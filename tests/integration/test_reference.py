"""The single-process run against plain PyTorch: explicit formulas and autograd."""

import pytest
import torch

from tests.support import jobs, reference
from tests.support.config_registry import STUDENT, TEACHER

STEPS = 4
LET = {"student_shape": STUDENT, "teacher_shape": TEACHER, "block": 0, "weight": 0.5, "stop_step": 4}


def train_reference(probe, teacher, num_accumulations):
    """Trains from the probe's initial weights on its batches; returns gradients per step, weights, and cosines."""
    groups = [
        probe["batches"][i : i + num_accumulations] for i in range(0, STEPS * num_accumulations, num_accumulations)
    ]
    batches = [[torch.cat(parts) for parts in zip(*group, strict=True)] for group in groups]
    steps, weights = reference.train(probe["initial"], teacher, batches, probe["lrs"], **LET)
    return [step["gradients"] for step in steps], weights, [step["cosine"] for step in steps]


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
