"""A Llama of transformers run by torchtitan: which ones are, and that their states are those of transformers.

Shape legend: B batch, L sequence, E teacher width.
"""

import pytest
import torch
import transformers
from torchtitan.config import CompileConfig

from let_plugin.teacher.hf.source import HFTeacherSource
from let_plugin.teacher.titan.source import TitanTeacherSource
from let_plugin.teacher.titan.spec import check_agrees, make_spec, obstacle
from tests.support import gguf_files, hf_models
from tests.support.hf_models import opened
from tests.support.problems import problem_of

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 80, "vocab_size": 512, "max_position_embeddings": 64, "rms_norm_eps": 1e-3}
ROPES = {
    "SmolLM": {"rope_type": "default", "rope_theta": 10_000.0},
    "SmolLM2": {"rope_type": "default", "rope_theta": 100_000.0},
    "Llama 3.2": {"rope_type": "llama3", "rope_theta": 500_000.0, **SCALING},
}


def save(folder, model_type, **fields):
    """A random model in `folder`, which it returns."""
    hf_models.save(folder, transformers.AutoConfig.for_model(model_type, **SIZES | fields))
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def assert_states_are_those_of(teacher, model, lengths):
    """A row of one document, and one of packed ones, each against transformers' states of the document alone."""
    tokens_1L = torch.randint(model.config.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    expected_1LE = model(input_ids=tokens_1L).last_hidden_state
    for positions_1L in (None, torch.arange(sum(lengths))[None]):
        torch.testing.assert_close(teacher(tokens_1L, positions_1L), expected_1LE, rtol=0, atol=1e-4)
    positions_1L = torch.cat([torch.arange(n) for n in lengths])[None]
    expected_1LE = torch.cat([model(input_ids=t).last_hidden_state for t in tokens_1L.split(lengths, 1)], dim=1)
    torch.testing.assert_close(teacher(tokens_1L, positions_1L), expected_1LE, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "rope_parameters": ROPES["SmolLM"], "tie_word_embeddings": True},
        {"model_type": "llama", "rope_parameters": ROPES["SmolLM2"], "tie_word_embeddings": False},
        {"model_type": "llama", "rope_parameters": ROPES["Llama 3.2"], "tie_word_embeddings": True},
        {"model_type": "mistral", "sliding_window": None},
    ],
)
@torch.no_grad()
def test_a_llama_by_its_path_alone_is_native_and_equals_transformers(tmp_path, build, config, fields):
    """Grouped-query attention, an epsilon that shows, and the rotary embedding of each kind."""
    model = save(tmp_path, **fields)
    compiled = fields.get("tie_word_embeddings") is False
    config.compile = CompileConfig(enable=compiled, components=["model"], backend="aot_eager")
    source = opened(tmp_path)
    assert isinstance(source, TitanTeacherSource) and source.info.is_native
    assert "run by torchtitan" in source.info.description
    assert source.info.max_seq_len == 64
    assert source.info.num_trunk_params == sum(p.numel() for p in model.model.parameters())
    assert_states_are_those_of(build(source), model.model, [9, 20, 4])


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"head_dim": 32}, "not 32"),
        ("llama", {"num_attention_heads": 12, "num_key_value_heads": 4}, "no heads of width 8"),
        ("llama", {"rope_parameters": LINEAR}, "'linear'"),
        ("llama", {"rope_parameters": LINEAR | {"rope_type": "default"}}, "factor = 2.0"),
        ("mistral", {"sliding_window": 5}, "sliding_window = 5"),
        ("qwen2", {}, "the family qwen2"),
    ],
)
def test_what_the_native_model_lacks(model_type, fields, reason):
    assert reason in obstacle(transformers.AutoConfig.for_model(model_type, **SIZES | fields))


def test_for_what_the_native_model_lacks_and_where_it_is_asked_for_transformers_runs_the_teacher(tmp_path):
    save(tmp_path, "llama", mlp_bias=True)
    for options, reason in (({}, "the native model has no mlp_bias"), ({"spec": "transformers"}, "teacher.spec = ")):
        source = opened(tmp_path, **options)
        assert isinstance(source, HFTeacherSource) and not source.info.is_native
        assert f"run by transformers ({reason}" in source.info.description
    save(tmp_path, "llama").model.save_pretrained(tmp_path)
    assert "run by transformers (it was saved without its head)" in opened(tmp_path).info.description


@torch.no_grad()
def test_a_gguf_llama_is_native(tmp_path, build):
    pytest.importorskip("gguf", reason="pip install let-plugin[hf]")
    path = gguf_files.write_llama(tmp_path / "tiny.gguf", width=64, hidden=96)
    source = opened(path)
    assert source.info.is_native
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    assert_states_are_those_of(build(source), model.model, [9, 20, 4])


def test_a_named_spec_agrees_with_the_config_it_is_made_of_in_its_old_form_too_and_with_no_other():
    hf_config = transformers.LlamaConfig(**SIZES, rope_parameters=ROPES["Llama 3.2"]).to_dict()
    spec = make_spec(transformers.LlamaConfig(**hf_config))
    old = {k: v for k, v in hf_config.items() if k != "rope_parameters"} | {"rope_theta": 500_000.0}
    scaling = {"type": "llama3", **SCALING}
    for agreeing in (hf_config, old | {"rope_scaling": scaling}, {"model_type": "llama"}):
        check_agrees(agreeing, spec, name="mine")
    for other, said in (
        (old | {"rope_scaling": None}, "rope_type = 'default'"),
        (old | {"rope_scaling": scaling | {"factor": 4}}, "factor = 4"),
        (hf_config | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (hf_config | {"num_attention_heads": 18}, "num_attention_heads = 18"),
        (hf_config | {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        (hf_config | {"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06"),
    ):
        problem = problem_of(check_agrees, other, spec, name="mine")
        assert (problem.key, problem.value) == ("let.teacher.spec", "mine")
        assert problem.message.startswith(f"its config.json has {said}, the spec ")
