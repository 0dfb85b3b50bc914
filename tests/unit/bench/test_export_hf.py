"""The exported model is the same model."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.models.common import RoPE

from let_plugin.bench import export_hf
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TOKENIZER
from let_plugin.runtime import host
from let_plugin.runtime.models import llama_spec
from tests.support.config_registry import tiny, tiny_qwen3

transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

SCALING = {"scaling": "llama", "scaling_factor": 4.0, "original_max_position_embeddings": 16}
UNTIED = {"num_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-3}
TIED = {"tie_embeddings": True, "norm_eps": 1e-6, "embedding_init_std": 0.02}
STRETCHED = {"max_seq_len": 64}


def saved(shape, folder, **more):
    """A configuration, its model with random weights, and a checkpoint of it."""
    config = tiny()
    size = {"dim": 48, "num_layers": 2, "num_heads": 4, "hidden_dim": 80, "vocab_size": 4096}
    config.model_spec = llama_spec("exported", **size, **shape)
    if shape is STRETCHED:
        for _, rope, _, _ in config.model_spec.traverse(RoPE.Config):
            for name, value in SCALING.items():
                setattr(rope, name, value)
    host.adapt_model_spec(config.model_spec)
    torch.manual_seed(0)
    model = config.model_spec.model.build()
    model.init_states()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # not all ones
                parameter.uniform_(0.5, 1.5)
    dcp.save(model.state_dict() | more, checkpoint_id=str(folder), no_dist=True)
    return config, model.eval()


@pytest.mark.parametrize(
    ("shape", "tokenizer_files"),
    [(UNTIED, "*"), (TIED, "tokenizer.json"), (STRETCHED, "*")],  # one file does not say of which class it is
    ids=["untied", "tied", "stretched"],
)
def test_logits_and_tokens_are_the_same(shape, tokenizer_files, tmp_path, parallel_dims):
    config, model = saved(shape, tmp_path / "checkpoint", optimizer={"lr": torch.tensor(1.0)})
    (tmp_path / "assets").mkdir()
    for file in Path(TOKENIZER).glob(tokenizer_files):
        shutil.copy(file, tmp_path / "assets")
    config.hf_assets_path = str(tmp_path / "assets")
    export_hf.export(config, str(tmp_path / "checkpoint"), tmp_path / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported) is transformers.LlamaForCausalLM and exported.dtype == torch.float32
    tokens_BL = torch.randint(4096, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BLV = model(tokens_BL, positions=torch.arange(33).repeat(2, 1))
        found_BLV = exported(tokens_BL).logits
    assert expected_BLV.std() > 0.05
    torch.testing.assert_close(found_BLV, expected_BLV, atol=1e-4, rtol=1e-4)
    text = "The river Thames, 346 km long."
    own = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{TOKENIZER}/tokenizer.json")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == own(text).input_ids


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    config, model = saved(TIED, tmp_path / "checkpoint")
    before = sorted(tmp_path.rglob("*"))

    def refused(config, checkpoint, out="out"):
        with pytest.raises(ConfigError) as caught:
            export_hf.export(config, str(tmp_path / checkpoint), tmp_path / out)
        assert sorted(tmp_path.rglob("*")) == before
        return str(caught.value)

    message = refused(tiny_qwen3(), "checkpoint")
    assert "only models of torchtitan's llama3 type" in message and "qwen3" in message
    assert "not a checkpoint of torchtitan" in refused(tiny(), "missing")
    message = refused(tiny(), "checkpoint")  # another model's
    assert "its layers.3.attention_norm.weight is missing" in message
    assert "its layers.0.feed_forward.w1.weight is torch.Size([80, 48]); " in message
    weights = model.state_dict() | {"layers.0.attention.qkv_linear.wq.bias": torch.zeros(48)}
    with pytest.raises(ConfigError, match="parameters that transformers' llama has not"):
        export_hf.write(config.model_spec, weights, tmp_path / "out")
    config.hf_assets_path = str(tmp_path)
    message = refused(config, "checkpoint", out="checkpoint")  # is there, and there is no tokenizer
    assert "--out" in message and "hf_assets_path" in message
