"""The teacher's held-out loss in one process; `tests/integration/test_adaptive_stop.py` has it on several."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torchtitan.components.validate import Validator
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from let_plugin.guidance.teacher_loss import is_measurable, measure_teacher_loss
from tests.support import config_registry as tiny
from tests.support import reference


@pytest.fixture
def config(config, headed_teacher):
    config.let.teacher.path = str(headed_teacher[0])
    loader = HuggingFaceTextDataLoader.Config(dataset="let_demo_validation", infinite=False)
    config.validator = Validator.Config(enable=True, freq=2, steps=2, dataloader=loader)
    return config


def expected_loss(trainer, weights):
    """In plain PyTorch, over the batches that torchtitan's validator gives the student."""
    batches = []
    validator = trainer.validator
    inner = validator.post_dataloading_process

    def record(input_dict, labels, model_parts):
        batches.append((input_dict["input"].clone(), input_dict["positions"].clone(), labels.clone()))
        return inner(input_dict, labels, model_parts)

    validator.post_dataloading_process = record
    validator.validate(trainer.model_parts, 1)
    loss, num_tokens = 0.0, 0
    for tokens_BL, positions_BL, labels_BL in batches:
        _, states_BLE = reference.llama(weights, tokens_BL, positions_BL, **tiny.TEACHER)
        logits_NV = (states_BLE @ weights["lm_head.weight"].T).flatten(0, 1)
        loss += F.cross_entropy(logits_NV, labels_BL.flatten(), reduction="sum").item()
        num_tokens += (labels_BL != -100).sum().item()
    return loss / num_tokens, len(batches)


@pytest.mark.parametrize("steps", [3, -1])  # -1: all of the data
def test_it_is_that_of_plain_pytorch_on_the_validators_batches(trainer, headed_teacher, steps):
    trainer.validator.config.steps = steps
    if steps == -1:
        trainer.validator.dl_config = dataclasses.replace(trainer.validator.dl_config, infinite=False)
        trainer.validator.local_batch_size = 128
    expected, num_batches = expected_loss(trainer, headed_teacher[1])
    assert num_batches == steps if steps > 0 else num_batches > 1
    rng_state = torch.get_rng_state()
    assert measure_teacher_loss(trainer) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), rng_state)


def test_a_validator_of_another_kind_is_told_from_torchtitans():
    class Sampler(Validator):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(Validator.Config):
            pass

        def validate(self, model_parts, step):
            pass

    assert is_measurable(Validator.Config())
    assert not is_measurable(Sampler.Config())
