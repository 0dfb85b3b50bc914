"""Teachers with their head: the logits of transformers, and the loss of plain PyTorch.

Shape legend: B batch, L sequence, V vocabulary.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers

from let_plugin.demo import TEACHER
from let_plugin.teacher import language_model as module
from let_plugin.teacher.language_model import loss_sums
from tests.support import config_registry as tiny
from tests.support import hf_models, reference
from tests.support.hf_models import language_model, opened, packed_batch
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
    logits_of = language_model(opened(path, spec=spec))
    assert torch.equal(torch.get_rng_state(), rng_state)

    def expected(tokens):
        return model(input_ids=tokens).logits

    tokens_BL, positions_BL = packed_batch(model.config.vocab_size)
    expected_BLV = hf_models.alone(expected, tokens_BL)
    torch.testing.assert_close(logits_of(tokens_BL, positions_BL), expected_BLV, rtol=0, atol=2e-4)
    torch.testing.assert_close(logits_of(tokens_BL, None), expected(tokens_BL), rtol=0, atol=2e-4)
    assert not logits_of.head.weight.requires_grad


@torch.no_grad()
def test_logits_of_a_torchtitan_checkpoint(tiny_teacher, tmp_path):
    head_VE = torch.randn(tiny.VOCAB_SIZE, tiny.TEACHER_DIM, generator=torch.Generator().manual_seed(2))
    dcp.save({**tiny_teacher[1], "lm_head.weight": head_VE}, checkpoint_id=str(tmp_path), no_dist=True)
    logits_of = language_model(opened(tmp_path, spec="tiny_teacher"))
    batch = packed_batch(tiny.VOCAB_SIZE)
    _, states_BLE = reference.llama(tiny_teacher[1], *batch, **tiny.TEACHER)
    torch.testing.assert_close(logits_of(*batch), states_BLE @ head_VE.T, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_without_a_head_is_said(folders, tmp_path):
    transformers.AutoModel.from_pretrained(folders["qwen2"]).save_pretrained(tmp_path)
    problem = problem_of(language_model, opened(tmp_path))
    assert (
        problem.key == "let.teacher.path"
        and "lacks tensors that its configuration asks for: lm_head.weight" in problem.message
    )


@pytest.mark.parametrize("max_logits", [1, 2 * 24 * 17, 2**27])
def test_loss_sums_are_those_of_plain_pytorch(monkeypatch, max_logits):
    monkeypatch.setattr(module, "_MAX_LOGITS", max_logits)
    generator = torch.Generator().manual_seed(0)
    table_VV = torch.randn(17, 17, generator=generator)
    seen = []

    def model(tokens_BL, positions_BL):
        seen.append(len(tokens_BL))
        return table_VV[tokens_BL].bfloat16()

    batches = []
    for _ in range(2):
        tokens_BL, labels_BL = (torch.randint(17, (5, 24), generator=generator) for _ in range(2))
        labels_BL[:, ::3] = -100
        batches.append((tokens_BL, None, labels_BL))
    loss, num_tokens = loss_sums(model, batches, vocab_size=17, device=torch.device("cpu")).tolist()
    expected = sum(
        F.cross_entropy(table_VV[t].bfloat16().float().flatten(0, 1), y.flatten(), reduction="sum").item()
        for t, _, y in batches
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    assert num_tokens == 2 * 5 * 16
    assert sum(seen) == 10 and max(seen) == {1: 1, 2 * 24 * 17: 2, 2**27: 5}[max_logits]
