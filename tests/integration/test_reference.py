"""The single-process run against plain PyTorch: explicit formulas and autograd."""

import itertools

import pytest
import torch

from let_plugin.demo import TOKENIZER
from let_plugin.tokens.alignment import Retokenizer
from tests.support import jobs, reference, tokenizer_kinds
from tests.support.config_registry import STUDENT, TEACHER

pytestmark = pytest.mark.slow

TEACHER_SEQ_LEN = 128  # of 64 of the student's


def train_reference(probe, teacher, weight=0.5, **kwargs):
    """Trains from the probe's initial weights on its batches: (what each step did, the final weights)."""
    shapes = {"student_shape": STUDENT, "teacher_shape": TEACHER, "block": 0}
    batches, lrs = probe["batches"], probe["lrs"]
    return reference.train(probe["initial"], teacher, batches, lrs, weight=weight, stop_step=4, **shapes, **kwargs)


def assert_equal(probe, metrics, steps, weights, tolerance):
    num_aligned = sum(line["let/active"] for line in metrics)
    for got, expected in zip(probe["gradients"], steps, strict=True):
        assert jobs.relative_difference(got, expected["gradients"]) <= tolerance
    assert jobs.relative_difference(probe["final"], weights) <= tolerance
    cosines = [line["let/cosine"] for line in metrics if line["let/active"]]
    assert cosines == pytest.approx([step["cosine"] for step in steps[: int(num_aligned)]], abs=tolerance)


def test_gradients_weights_and_metrics_equal_the_reference(tmp_path, tiny_config, tiny_teacher):
    probe = jobs.probe(tmp_path / "out", tiny_config)
    assert_equal(probe, jobs.metrics(tmp_path / "out"), *train_reference(probe, tiny_teacher[1]), 1e-6)
    # A missing alignment would be noticed.
    without, _ = train_reference(probe, tiny_teacher[1], weight=0)
    assert jobs.relative_difference(probe["gradients"][0], without[0]["gradients"]) > 1e-3


def test_code_that_is_compiled_and_checkpointed_does_the_same(tmp_path, tiny_config, tiny_teacher):
    """Activation checkpointing runs a block twice, compilation replaces it: the tap must not care."""
    with tiny_config.open("a") as f:
        f.write('\n[activation_checkpoint]\ntype = "selective"\n')
    probe = jobs.probe(tmp_path / "out", tiny_config, "--compile.enable")
    steps, weights = train_reference(probe, tiny_teacher[1])
    # Not those of later steps: their weights differ by rounding, which AdamW amplifies.
    assert jobs.relative_difference(probe["gradients"][0], steps[0]["gradients"]) <= 1e-5
    assert jobs.relative_difference(probe["final"], weights) <= 1e-5


def test_a_teacher_on_half_of_the_rows_equals_the_reference(tmp_path, tiny_config, tiny_teacher):
    """As if the loss were over these rows alone: lambda keeps its meaning."""
    args, two_ranks = ["--let.teacher.rows", 0.5], jobs.LAYOUTS["FSDP2"]
    one = jobs.probe(tmp_path / "one", tiny_config, *args)
    two = jobs.probe(tmp_path / "two", tiny_config, *args, *two_ranks, processes=2) | {"batches": one["batches"]}
    # Of a global batch of 4 rows, the first half of each rank's, then the second.
    for name, probe, chosen in (("one", one, [[0, 1], [2, 3]]), ("two", two, [[0, 2], [1, 3]])):
        steps = itertools.cycle(chosen)

        def half(batch, steps=steps):
            tokens_BL, positions_BL, _ = batch
            index_BL = torch.full_like(tokens_BL, -1)
            index_BL[next(steps)] = torch.arange(tokens_BL.shape[1])
            return tokens_BL, positions_BL, index_BL

        expected = train_reference(probe, tiny_teacher[1], retokenize=half, per_target=True)
        assert_equal(probe, jobs.metrics(tmp_path / name), *expected, 1e-6 if name == "one" else 1e-5)


def test_a_teacher_with_another_tokenizer_equals_the_reference(tmp_path, tiny_config, tiny_teacher):
    teacher = tokenizer_kinds.write_for_teacher(tmp_path / "tokenizer", tiny_config, TEACHER_SEQ_LEN)
    # The labels that the probe records are those that the data loader has made.
    args = ["--training.steps", 5, "--dataloader.ignore_every", 0]
    probe = jobs.probe(tmp_path / "out", tiny_config, *args)

    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    student = HuggingFaceTokenizer(tokenizer_path=str(TOKENIZER))
    retokenizer = Retokenizer(student, teacher, teacher_seq_len=TEACHER_SEQ_LEN)

    def retokenize(batch):
        extras = retokenizer({"input": batch[0], "positions": batch[1]}, batch[2])
        return extras["teacher_tokens"], extras["teacher_positions"], extras["teacher_index"]

    metrics = jobs.metrics(tmp_path / "out")
    assert_equal(probe, metrics, *train_reference(probe, tiny_teacher[1], retokenize=retokenize), 1e-6)
    assert [line["let/active"] for line in metrics] == [1] * 4 + [0]
    for line, batch in zip(metrics[:4], probe["batches"], strict=False):
        counts_BL = batch[2] != reference.IGNORE_INDEX
        fraction = (counts_BL & (retokenize(batch)[2] >= 0)).sum() / counts_BL.sum()
        assert line["let/aligned_fraction"] == pytest.approx(fraction.item()) and fraction > 0.9
    assert "let/aligned_fraction" not in metrics[-1]
