"""Every mistake in a checkpoint in Hugging Face format is one error that names the key, the value and the cause."""

import math
import shutil
import sys

import pytest
import torch
import transformers

from let_plugin.config.errors import ConfigError
from tests.support.hf_models import FILE, build, config_with, content, opened, source_of, weights, without

DOWN, QUERY, NORM = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


def spoiled(value):
    def edit(tensors):
        for name in (DOWN, QUERY):
            tensors[name][-1, 3] = value
        return tensors

    return weights(edit)


def nothing(folder):
    for file in folder.iterdir():
        file.unlink()


def pickled(folder):
    (folder / FILE).rename(folder / "pytorch_model.bin")


def refusal(path, *, load=False):
    """The text of the error that the source (or, with `load`, only its build) must raise."""
    source = source_of(path) if load else None
    with pytest.raises(ConfigError) as error:
        build(source) if source else source_of(path)
    text = str(error.value)
    assert text.startswith(f"let.teacher.path = '{path}': ") or "trust_remote_code" in text
    return text


OPENED = [  # damage to a folder, part of the error
    (nothing, "no config.json"),
    (nothing, "no model.safetensors"),
    (content(b"{", "config.json"), "its configuration cannot be read"),
    (pickled, "convert them, if you trust them: AutoModelForCausalLM.from_pretrained(path).save_pretrained("),
    (config_with(model_type="my_own"), "update Transformers"),
    (
        config_with(model_type="my_own", auto_map={"AutoConfig": "my_own.MyConfig"}),
        "let.teacher.trust_remote_code = False",
    ),
    (config_with(quantization_config={"quant_method": "gptq"}), "quantized; give a checkpoint in bfloat16"),
    (without("1.mlp.up_proj"), "lacks tensors that its configuration asks for: layers.1.mlp.up_proj.weight"),
    (config_with(intermediate_size=56), "layers.0.mlp.down_proj.weight (file (32, 48), configuration (32, 56))"),
    (
        weights(lambda tensors: {**tensors, DOWN: tensors[DOWN].to(torch.int8)}),
        "layers.0.mlp.down_proj.weight (file integers, configuration floating-point numbers)",
    ),
    (config_with(num_hidden_layers=2), "its layers have more than its configuration (2 layers): model.layers.2."),
    (
        weights(lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
        "(3 layers): model.layers.0.self_attn.q_proj.bias",
    ),
    (lambda f: (pickled(f), content(b"{}", f"{FILE}.index.json")(f)), "index.json cannot be read"),
    (content(b"x" * 100), "model.safetensors is truncated or not a safetensors file"),
]


@pytest.mark.parametrize(
    ("family", "damage", "part"),
    [*(("llama", *case) for case in OPENED), ("olmoe", without("experts.3.gate_proj"), "mlp.experts.gate_up_proj")],
)
def test_what_is_wrong_is_said_when_it_is_opened(folders, tmp_path, family, damage, part):
    folder = shutil.copytree(folders[family], tmp_path / family)
    damage(folder)
    assert part in refusal(folder)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (spoiled(math.nan), "layers.0.mlp.down_proj.weight, layers.1.self_attn.q_proj.weight"),
        # Too large for the teacher's data type.
        (weights(lambda tensors: {**tensors, NORM: tensors[NORM].double() * 1e300}), "norm.weight"),
    ],
)
def test_tensors_that_are_not_finite_are_named_when_they_are_read(folders, tmp_path, damage, names):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    damage(folder)
    assert f"these tensors hold NaN or infinite values: {names}; fetch" in refusal(folder, load=True)


def test_a_file_that_is_truncated_before_or_after_its_header_was_read(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    source = source_of(folder)
    content((folder / FILE).read_bytes()[:-100])(folder)
    with pytest.raises(ConfigError, match=r"let\.teacher\.path.*its weights cannot be read: SafetensorError"):
        build(source)
    assert "model.safetensors is truncated" in refusal(folder)


@pytest.mark.parametrize(
    ("config_class", "fields", "reason"),
    [
        ("BertConfig", {}, "encoder"),
        ("T5Config", {}, "encoder-decoder"),
        ("ViTConfig", {}, "not a causal language model"),
        ("LlavaConfig", {}, "multimodal"),
        ("MambaConfig", {"num_hidden_layers": 2}, "cannot be kept apart"),
        ("GPTNeoConfig", {"num_layers": 2, "attention_types": [[["global"], 2]]}, "cannot be kept apart"),
        ("BloomConfig", {"n_layer": 2}, "cannot be kept apart"),
        ("GptOssConfig", {"num_hidden_layers": 2}, "cannot be kept apart"),
        ("Lfm2Config", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
    ],
)
def test_architectures_that_cannot_be_a_teacher(tmp_path, config_class, fields, reason):
    getattr(transformers, config_class)(**fields).save_pretrained(tmp_path)
    (tmp_path / FILE).touch()
    assert reason in refusal(tmp_path)


def test_a_path_that_is_none(folders, tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").touch()
    for path in ("absent", "a.safetensors"):
        assert "no such folder" in refusal(tmp_path / path)
    with pytest.raises(ConfigError, match=r"let\.teacher\.path = '': no teacher is given; set it to a folder"):
        opened()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install let-plugin\[hf\]"):
        source_of(folders["llama"])
