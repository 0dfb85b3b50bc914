"""The states of a teacher with another tokenizer, on a real trainer of one process."""

import re

import pytest
import torch
from tokenizers import Tokenizer, models
from torchdata.stateful_dataloader import stateful_dataloader
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.alignment.tap import TARGET_KWARG
from let_plugin.config import TokenAlignmentConfig
from let_plugin.guidance.guidance import Guidance
from let_plugin.preflight import checks as preflight
from let_plugin.runtime.batch_extras import take_extras
from tests.support import tokenizer_kinds as kinds
from tests.support.fields import set_all
from tests.support.problems import problem_of


@pytest.fixture
def other(tmp_path, config):
    """The configuration with a teacher that has another tokenizer."""
    kinds.write(kinds.byte_level(), tmp_path / "other", bos="<|begin|>", eos="<|end|>")
    config.let.teacher.tokenizer_path = str(tmp_path / "other")
    config.let.token_alignment = TokenAlignmentConfig(enable=True)
    return config


def first_batch(trainer):
    """(input_dict, labels_BL, extras) from the data loader."""
    input_dict, labels_BL = next(iter(trainer.dataloader))
    extras = take_extras(input_dict)
    return input_dict, labels_BL, extras


@pytest.mark.parametrize("length", [64, None])
def test_the_same_tokenizer_gives_the_targets_of_the_direct_path(config, trainer, length):
    config.let.token_alignment = TokenAlignmentConfig(enable=True, teacher_seq_len=length)
    guidance = Guidance(trainer, trainer.terms, 0)
    input_dict, labels_BL, extras = first_batch(trainer)
    assert extras["teacher_tokens"].shape[1] == (length or 80)
    target_BLE = guidance.targets(input_dict, labels_BL, extras)[TARGET_KWARG]
    guidance.end()
    config.let.token_alignment = TokenAlignmentConfig()
    direct_BLE = Guidance(trainer, trainer.terms, 0).targets(input_dict, labels_BL)[TARGET_KWARG]
    assert direct_BLE.any()
    # Exactly, or up to the rounding of the kernels of another length.
    torch.testing.assert_close(target_BLE, direct_BLE, rtol=0, atol=0 if length else 1e-5)


def test_each_token_gets_the_state_that_it_meets(other, trainer):
    guidance = Guidance(trainer, trainer.terms, 0)
    input_dict, labels_BL, extras = first_batch(trainer)
    length = other.training.seq_len * 5 // 4
    assert extras["teacher_tokens"].shape == (4, length)
    target_BLE = guidance.targets(input_dict, labels_BL, extras)[TARGET_KWARG]
    states_BTE = guidance.teacher(extras["teacher_tokens"], extras["teacher_positions"])
    has_state_BL = (extras["teacher_index"] >= 0) & (labels_BL != IGNORE_INDEX)
    assert has_state_BL.any() and not has_state_BL.all()
    for b, i in has_state_BL.nonzero().tolist():
        assert torch.equal(target_BLE[b, i], states_BTE[b, extras["teacher_index"][b, i]])
    assert not target_BLE[~has_state_BL].any()


def test_the_report_and_a_warning_if_little_is_aligned(other, short_teacher, caplog, monkeypatch):
    # Data loader workers of a trial would be forked, and read ahead, for nothing.
    monkeypatch.setattr(stateful_dataloader, "_StatefulMultiProcessingDataLoaderIter", None)
    other.dataloader.num_workers = 2
    lines = preflight.run(other)
    assert "two tokenizers, matched by bytes of text; of 256 rows of the data" in lines
    assert "64 tokens are" in lines and "with room for 80 (let.token_alignment.teacher_seq_len)" in lines
    assert "x 1.25 of the tokens" in lines and "have a state" not in caplog.text
    other.let.teacher.spec = short_teacher  # for shorter sequences than the student's
    assert "with room for 32" in preflight.run(other)
    other.let.token_alignment.teacher_seq_len = 16
    preflight.run(other)
    assert "of the tokens of the first 256 rows have a state" in caplog.text and "teacher_seq_len is 16" in caplog.text


def word_piece(config, folder):
    kinds.write(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")), folder / "other")


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"token_alignment": TokenAlignmentConfig()}, "let.teacher.path", "let.token_alignment.enable = true"),
        ({"token_alignment__teacher_seq_len": 0}, "let.token_alignment.teacher_seq_len", "at least 1"),
        ({"token_alignment__teacher_seq_len": 200_000}, "let.token_alignment.teacher_seq_len", "at most 131072"),
        # The folder with the weights has no tokenizer.
        ({"teacher__tokenizer_path": ""}, "let.teacher.tokenizer_path", "comes without a tokenizer"),
        (word_piece, "let.token_alignment.enable", "the teacher's tokenizer cannot be matched .*WordPiece"),
    ],
)
def test_what_cannot_be_matched_is_one_error(other, tmp_path, changes, key, message):
    if callable(changes):
        changes(other, tmp_path)
    else:
        set_all(other.let, **changes)
    problem = problem_of(preflight.run, other)
    assert problem.key == key and re.search(message, problem.message)
