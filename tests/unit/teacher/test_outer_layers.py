"""The embeddings and the head of a teacher, of every kind, or why there are none that the formula takes."""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers

from let_plugin.demo import TEACHER
from tests.support import gguf_files, jobs
from tests.support.hf_models import language_model, opened
from tests.support.problems import problem_of

SCALED = {"gemma": 32**0.5, "gemma2": 32**0.5, "gemma3": 32**0.5}  # by what the family multiplies its embeddings
PLAIN = ["llama", "qwen3", "olmoe", "gemma", "gemma3"]
OTHERS = ["gpt2", "phi", "gemma2"]  # a LayerNorm, a bias, a soft cap


@pytest.mark.parametrize("family", [*PLAIN, *OTHERS])
def test_a_family_is_read_as_it_is_or_refused(folders, family):
    source = opened(folders[family])
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    embeddings_VE = model.get_input_embeddings().weight.detach()
    got = source.outer_layers(head=False)
    assert got.keys() == {"embeddings"}
    torch.testing.assert_close(got["embeddings"], SCALED.get(family, 1.0) * embeddings_VE)
    if family in OTHERS:
        assert "RMS norm and a head without a bias" in problem_of(source.outer_layers, head=True).message
        return
    gain_E = model.model.norm.weight.detach() + (1 if family in SCALED else 0)
    assert torch.equal(source.outer_layers(head=True)["head"], model.lm_head.weight.detach() * gain_E)


def test_the_same_by_torchtitan_and_by_transformers():
    """Of a tied model; its random numbers stay as they were."""
    state = torch.get_rng_state()
    native, other = (opened(TEACHER, spec=spec).outer_layers(head=True) for spec in ("", "transformers"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(native[name], other[name]) for name in ("embeddings", "head"))


def test_a_torchtitan_checkpoint_needs_no_more_than_these_layers(tiny_teacher, tmp_path):
    weights = jobs.make_teacher(tmp_path, with_head=True)
    trunk, source = (opened(path, spec="tiny_teacher") for path in (tiny_teacher[0], tmp_path))
    outer = {name: weights[name] for name in ("tok_embeddings.weight", "norm.weight", "lm_head.weight")}
    dcp.save(outer, checkpoint_id=str(tmp_path), no_dist=True)  # the blocks are gone
    got = source.outer_layers(head=True)
    assert torch.equal(got["embeddings"], outer["tok_embeddings.weight"])
    assert torch.equal(got["head"], outer["lm_head.weight"] * outer["norm.weight"])
    assert trunk.outer_layers(head=False).keys() == {"embeddings"}
    for read in (lambda: trunk.outer_layers(head=True), lambda: language_model(trunk)):
        problem = problem_of(read)
        assert problem.key == "let.teacher.path" and "lm_head.weight" in problem.message


def test_gguf(tmp_path):
    pytest.importorskip("gguf", reason="pip install let-plugin[hf]")
    rng = np.random.default_rng(0)
    tensors = {"token_embd": rng.standard_normal((32, 32), np.float32), "output_norm": np.full(32, 3, np.float32)}
    file = gguf_files.write_llama(tmp_path / "a.gguf", width=32, **tensors)
    got = opened(file).outer_layers(head=True)
    assert np.array_equal(got["embeddings"], tensors["token_embd"])
    assert np.array_equal(got["head"], 3 * tensors["token_embd"])  # tied
