"""Teachers with their head: the logits of transformers, and the loss of plain PyTorch.

Shape legend: B batch, L sequence, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers

from let_plugin.demo import TEACHER
from let_plugin.teacher import language_model
from tests.support import hf_models
from tests.support.hf_models import opened, packed_batch
from tests.support.problems import problem_of


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(("demo", spec) for spec in ("transformers", "", "demo_teacher")),  # a tied model
        *((family, "") for family in ("gpt2", "opt", "gpt_neox", "gemma2", "qwen2")),  # Gemma 2 caps its logits
    ],
)
@torch.no_grad()
def test_logits_are_those_of_transformers_of_each_document_alone(folders, name, spec):
    path = TEACHER if name == "demo" else str(folders[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    rng_state = torch.get_rng_state()
    logits_of = hf_models.language_model(opened(path, spec=spec))
    assert torch.equal(torch.get_rng_state(), rng_state)

    def expected(tokens):
        return model(input_ids=tokens).logits

    tokens_BL, positions_BL = packed_batch(model.config.vocab_size)
    expected_BLV = hf_models.alone(expected, tokens_BL)
    torch.testing.assert_close(logits_of(tokens_BL, positions_BL), expected_BLV, rtol=0, atol=2e-4)
    torch.testing.assert_close(logits_of(tokens_BL, None), expected(tokens_BL), rtol=0, atol=2e-4)
    with torch.enable_grad():
        assert not logits_of(tokens_BL, None).requires_grad


def test_a_checkpoint_without_a_head_is_said(folders, tmp_path):
    transformers.AutoModel.from_pretrained(folders["qwen2"]).save_pretrained(tmp_path)
    problem = problem_of(hf_models.language_model, opened(tmp_path))
    assert problem.key == "let.teacher.path"
    assert "lacks tensors that its configuration asks for: lm_head.weight" in problem.message


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_losses_are_those_of_plain_pytorch_however_many_rows_at_a_time(monkeypatch, num_rows):
    monkeypatch.setattr(language_model, "_MAX_LOGITS", num_rows * 24 * 17)
    table_VV = torch.randn(17, 17, generator=torch.Generator().manual_seed(0)).bfloat16()

    def model(tokens_BL, positions_BL):
        assert len(tokens_BL) <= num_rows
        return table_VV[tokens_BL]

    tokens_BL = torch.arange(5 * 24).view(5, 24) % 17
    labels_BL = torch.where(tokens_BL % 3 == 0, -100, tokens_BL.roll(1))
    losses_BL = F.cross_entropy(table_VV[tokens_BL].float().mT, labels_BL, reduction="none").double()
    sums_B2 = language_model.row_loss_sums(model, tokens_BL, None, labels_BL, vocab_size=17)
    torch.testing.assert_close(sums_B2[:, 0], losses_BL.sum(dim=1), rtol=1e-6, atol=0)
    assert sums_B2[:, 1].tolist() == (labels_BL != -100).sum(dim=1).tolist()
