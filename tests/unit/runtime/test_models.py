"""llama_spec: initial weights."""

import pytest
import torch

from let_plugin.runtime import host
from let_plugin.runtime.models import llama_spec

SHAPE = {"dim": 64, "num_layers": 3, "num_heads": 4, "hidden_dim": 96, "vocab_size": 512, "max_seq_len": 77}


@pytest.mark.parametrize(("tied", "embedding_std"), [(False, 1.0), (False, 0.02), (True, 1.0)])
def test_initial_weights(tied, embedding_std):
    spec = llama_spec("test", **SHAPE, tie_embeddings=tied, embedding_init_std=embedding_std)
    host.adapt_model_spec(spec)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.model.build()
        model.init_weights(buffer_device=None)
    # A tied matrix is initialized as a head: logits of a fresh model are small either way.
    expected = 64**-0.5 if tied else embedding_std
    assert model.tok_embeddings.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    # Deeper blocks write less into the residual stream: 0.02 / sqrt(2 * (layer + 1)).
    for i, layer in enumerate(model.layers.values()):
        assert layer.attention.wo.weight.std().item() == pytest.approx(0.02 / (2 * (i + 1)) ** 0.5, rel=0.05)
