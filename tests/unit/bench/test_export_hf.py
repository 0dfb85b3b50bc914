"""The exported model is the same model."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from let_plugin.bench import export_hf
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TOKENIZER
from let_plugin.runtime import host
from let_plugin.runtime.models import Llama3RopeScaling, llama_spec
from tests.support.config_registry import tiny, tiny_qwen3

transformers = pytest.importorskip("transformers", reason="pip install let-plugin[eval]")

SCALING = Llama3RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
SHAPES = {
    "untied": {"num_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-3},
    "tied": {"tie_embeddings": True, "norm_eps": 1e-6, "embedding_init_std": 0.02},
    "stretched": {"rope_scaling": SCALING, "max_seq_len": 64},
}


def saved(shape, folder, **more):
    """A configuration, its model with random weights, and a checkpoint of it."""
    config = tiny()
    size = {"dim": 48, "num_layers": 2, "num_heads": 4, "hidden_dim": 80, "vocab_size": 4096}
    config.model_spec = llama_spec("exported", **size, **shape)
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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_logits_are_the_same(shape, tmp_path, parallel_dims):
    config, model = saved(shape, tmp_path / "checkpoint", optimizer={"lr": torch.tensor(1.0)})
    export_hf.export(config, str(tmp_path / "checkpoint"), tmp_path / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported) is transformers.LlamaForCausalLM and exported.dtype == torch.float32
    tokens_BL = torch.randint(4096, (2, 33), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(33).repeat(2, 1)
    with torch.no_grad():
        expected_BLV = model(tokens_BL, positions=positions_BL)
        found_BLV = exported(tokens_BL).logits
    assert expected_BLV.std() > 0.05
    torch.testing.assert_close(found_BLV, expected_BLV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("files", ["*", "tokenizer.json"])
def test_the_tokenizer_is_the_same(tmp_path, files):
    """Also if its one file does not say of which class it is."""
    config, _ = saved(SHAPES["untied"], tmp_path / "checkpoint")
    (tmp_path / "assets").mkdir()
    for file in Path(TOKENIZER).glob(files):
        shutil.copy(file, tmp_path / "assets")
    config.hf_assets_path = str(tmp_path / "assets")
    export_hf.export(config, str(tmp_path / "checkpoint"), tmp_path / "out")
    text = "The river Thames, 346 km long."
    own = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{TOKENIZER}/tokenizer.json")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == own(text).input_ids


def refused(config, checkpoint, out):
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        export_hf.export(config, str(checkpoint), out)
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


def test_another_family_is_refused(tmp_path):
    message = refused(tiny_qwen3(), tmp_path / "checkpoint", tmp_path / "out")
    assert "only models of torchtitan's llama3 type" in message and "qwen3" in message


def test_another_models_checkpoint_is_refused(tmp_path):
    assert "not a checkpoint of torchtitan" in refused(tiny(), tmp_path / "missing", tmp_path / "out")
    saved(SHAPES["untied"], tmp_path / "checkpoint")
    message = refused(tiny(), tmp_path / "checkpoint", tmp_path / "out")
    assert "its layers.3.attention_norm.weight is missing" in message
    assert "its layers.0.feed_forward.w1.weight is torch.Size([80, 48]); " in message


def test_a_parameter_that_would_be_left_out_is_refused(tmp_path):
    config, model = saved(SHAPES["tied"], tmp_path / "checkpoint")
    weights = model.state_dict() | {"layers.0.attention.qkv_linear.wq.bias": torch.zeros(48)}
    with pytest.raises(ConfigError, match="parameters that transformers' llama has not"):
        export_hf.write(config.model_spec, weights, tmp_path / "out")


def test_what_is_there_is_not_overwritten(tmp_path):
    config, _ = saved(SHAPES["untied"], tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    config.hf_assets_path = str(tmp_path)
    message = refused(config, tmp_path / "checkpoint", tmp_path / "out")
    assert "--out" in message and "hf_assets_path" in message
