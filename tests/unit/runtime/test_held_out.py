"""Both splits, against plain PyTorch over the same batches."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from let_plugin.runtime.held_out import TEST_LOSS, TwoSplitValidator
from tests.support import jobs

STEPS = 2


@pytest.fixture
def config(config):
    loader = config.validator.dataloader
    test = dataclasses.replace(loader, dataset="let_demo_test")
    config.validator = TwoSplitValidator.Config(enable=True, freq=2, steps=STEPS, dataloader=loader, test=test)
    return config


def expected_loss(trainer, loader):
    """Mean over the tokens of the first batches of a split."""
    batches = dataclasses.replace(loader, infinite=True).build(
        dp_world_size=1, dp_rank=0, tokenizer=trainer.tokenizer, seq_len=64, local_batch_size=4
    )
    loss, num_tokens = 0.0, 0
    for _, (inputs, labels_BL) in zip(range(STEPS), batches, strict=False):
        hidden_BLD = trainer.model_parts[0](inputs["input"], positions=inputs["positions"])
        logits_BLV = trainer.model_parts[0].lm_head(hidden_BLD)
        loss += F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), reduction="sum").item()
        num_tokens += labels_BL.numel()
    return loss / num_tokens


@torch.no_grad()
def test_both_splits_are_those_of_plain_pytorch(trainer, config, tmp_path):
    validator = trainer.validator
    processor = validator.metrics_processor
    validator.validate(trainer.model_parts, 1)
    validation, test = validator.losses
    assert validation == pytest.approx(expected_loss(trainer, config.validator.dataloader), rel=1e-5)
    assert test == pytest.approx(expected_loss(trainer, config.validator.test), rel=1e-5)
    assert abs(validation - test) > 1e-4
    (line,) = jobs.metrics(tmp_path / "out")
    assert (line["validation_metrics/loss"], line[TEST_LOSS]) == (validation, test)
    assert validator.metrics_processor is processor
    validator.validate(trainer.model_parts, 2)  # the same batches again
    assert validator.losses == (validation, test)
