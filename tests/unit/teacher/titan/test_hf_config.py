"""A specification against the config.json beside the weights."""

import json

import pytest

from let_plugin.config.errors import ConfigError
from let_plugin.teacher.titan.hf_config import check_agrees, read_hf_config
from let_plugin.teacher.titan.specs import BUILT_IN_SPECS

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
SCALING = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_3_2_1B = SMOLLM2_135M | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": SCALING | {"rope_type": "llama3"},
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
# As transformers 5 writes it.
NEW_STYLE = {k: v for k, v in LLAMA_3_2_1B.items() if k not in ("rope_theta", "rope_scaling")} | {
    "rope_parameters": SCALING | {"rope_type": "llama3", "rope_theta": 500000.0}
}


def problems_of(hf_config, name="smollm2-135m"):
    try:
        check_agrees(hf_config, BUILT_IN_SPECS[name](), name=name)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("hf_config", "name"),
    [
        (SMOLLM2_135M, "smollm2-135m"),
        (SMOLLM2_135M | {"rope_theta": 10000.0}, "smollm-135m"),
        (LLAMA_3_2_1B, "llama-3.2-1b"),
        (NEW_STYLE, "llama-3.2-1b"),
        ({"model_type": "llama"}, "llama-3.2-1b"),  # it says nothing
    ],
)
def test_the_models_own_configuration_agrees(hf_config, name):
    assert problems_of(hf_config, name) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_size", 960),
        ("intermediate_size", 1024),
        ("num_attention_heads", 18),
        ("num_hidden_layers", 12),
        ("num_key_value_heads", 9),
        ("rms_norm_eps", 1e-6),
        ("rope_theta", 10001.0),
        ("vocab_size", 49153),
        ("head_dim", 32),
    ],
)
def test_a_field_that_differs_is_named(field, value):
    (problem,) = problems_of(SMOLLM2_135M | {field: value})
    assert (problem.key, problem.value) == ("let.teacher.spec", "smollm2-135m")
    assert f"{field} = {value!r}" in problem.message


@pytest.mark.parametrize("scaling", [SCALING | {"rope_type": "llama3"}, SCALING | {"type": "llama3"}])
def test_a_scaling_that_the_spec_lacks_or_that_differs(scaling):
    (problem,) = problems_of(SMOLLM2_135M | {"rope_scaling": scaling})
    assert "rope_type = 'llama3', the spec 'default'" in problem.message
    (problem,) = problems_of(LLAMA_3_2_1B | {"rope_scaling": scaling | {"factor": 8.0}}, "llama-3.2-1b")
    assert "factor = 8.0, the spec 32.0" in problem.message
    assert "rope_type" in problems_of(LLAMA_3_2_1B | {"rope_scaling": None}, "llama-3.2-1b")[0].message


def test_all_differences_at_once_and_the_spec_that_would_do():
    problems = problems_of(SMOLLM2_135M, "smollm-360m")
    fields = {problem.message.split(" = ")[0].split()[-1] for problem in problems}
    assert fields == {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "rope_theta",
    }
    assert all("take 'smollm2-135m'" in problem.message for problem in problems)


def test_reading(tmp_path):
    assert read_hf_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M))
    assert read_hf_config(str(tmp_path)) == SMOLLM2_135M
    for damaged in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_bytes(damaged.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"let\.teacher\.path.*config\.json cannot be read"):
            read_hf_config(str(tmp_path))
