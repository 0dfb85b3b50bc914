"""Teachers with their head: the logits of transformers, and the loss of plain PyTorch.

Shape legend: B batch, L sequence, V vocabulary.
"""

import pytest
import torch
import transformers

from let_plugin.demo import TEACHER
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
