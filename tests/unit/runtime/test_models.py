"""llama_spec: sizes and initial weights."""

import pytest
import torch

from let_plugin.demo import config_registry as demo
from let_plugin.runtime import host
from let_plugin.runtime.models import llama_spec

SHAPE = {"dim": 64, "num_layers": 3, "num_heads": 4, "hidden_dim": 96, "vocab_size": 512, "max_seq_len": 77}


def build(spec=None, device="meta", **options):
    spec = spec or llama_spec("test", **SHAPE, **options)
    host.adapt_model_spec(spec)
    with torch.device(device):
        return spec.model.build()


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("tied", "embedding_std"), [(False, 1.0), (False, 0.02), (True, 1.0)])
def test_initial_weights(tied, embedding_std):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(device="cpu", tie_embeddings=tied, embedding_init_std=embedding_std)
        model.init_weights(buffer_device=None)
    # A tied matrix is initialized as a head: logits of a fresh model are small either way.
    expected = 64**-0.5 if tied else embedding_std
    assert model.tok_embeddings.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    # Deeper blocks write less into the residual stream: 0.02 / sqrt(2 * (layer + 1)).
    for i, layer in enumerate(model.layers.values()):
        assert layer.attention.wo.weight.std().item() == pytest.approx(0.02 / (2 * (i + 1)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("function", "millions"), [(demo.student, 7.2), (demo.teacher, 1.3), (demo.smollm2_student, 30)]
)
def test_the_demos_models_have_the_size_that_they_say(function, millions):
    assert num_parameters(build(function().model_spec)) / 1e6 == pytest.approx(millions, rel=0.03)
    assert f"{millions:g} million" in function.__doc__
