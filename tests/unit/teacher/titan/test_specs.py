"""The published teachers: their sizes, and their states against transformers'.

Shape legend: B batch, L sequence, E teacher width.
"""

import pytest
import torch
from torchtitan.config import CompileConfig

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.runtime import host
from let_plugin.runtime.models import Llama3RopeScaling, llama_spec
from let_plugin.teacher.open import open_teacher
from let_plugin.teacher.titan.source import TEACHER_SPECS, describe, register_teacher_spec
from let_plugin.teacher.titan.specs import BUILT_IN_SPECS
from tests.support.jobs import ROOT

# Parameters as their model cards count them, head tied to the embedding.
NUM_PARAMS = {
    "smollm-135m": 134_515_008,
    "smollm-360m": 361_821_120,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "llama-3.2-1b": 1_235_814_400,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(("name", "num_params"), NUM_PARAMS.items())
def test_a_name_is_enough(name, num_params):
    assert name in TEACHER_SPECS  # without an import by the user
    spec = TEACHER_SPECS.get(name).make_spec()
    host.adapt_model_spec(spec)
    info = describe(spec, "nowhere")
    assert info.num_trunk_params == num_params
    assert info.num_embedding_params == info.vocab_size * info.hidden_size
    assert info.hidden_size // info.num_heads == 64


def test_no_name_is_left_untested():
    assert set(BUILT_IN_SPECS) == set(NUM_PARAMS)


@pytest.fixture
def build(config, parallel_dims):
    def build(path, spec):
        source = open_teacher(TeacherConfig(spec=spec, path=str(path)))
        return source.build(
            dtype=torch.float32,
            device=torch.device("cpu"),
            config=config,
            parallel_dims=parallel_dims,
            layers=[source.info.num_layers - 1],
            final_norm=True,
        )

    return build


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
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "default", "rope_theta": 100_000.0},
        {"rope_type": "llama3", "rope_theta": 500_000.0, **SCALING},
    ],
    ids=["SmolLM", "SmolLM2", "Llama 3.2"],
)
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_tiny_models_of_each_kind_equal_transformers(tmp_path, build, config, rope, compiled):
    """Grouped-query attention, tied embeddings, an epsilon that shows, and the rotary embedding of each kind."""
    transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 80, "vocab_size": 512, "max_position_embeddings": 64, "rms_norm_eps": 1e-3}
    hf_config = transformers.LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(hf_config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(tmp_path)
    config.compile = CompileConfig(enable=compiled, components=["model"], backend="aot_eager")
    spec = {"dim": 96, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "hidden_dim": 80, "vocab_size": 512}
    spec |= {"norm_eps": 1e-3, "tie_embeddings": True, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        spec["rope_scaling"] = Llama3RopeScaling(**SCALING)
    register_teacher_spec("tiny_llama", lambda: llama_spec("tiny_llama", **spec))
    try:
        assert_states_are_those_of(build(tmp_path, "tiny_llama"), model.model, [9, 20, 4])
        info = open_teacher(TeacherConfig(spec="tiny_llama", path=str(tmp_path))).info
        assert info.max_seq_len == 64  # the weights'; the specification would allow more
    finally:
        TEACHER_SPECS.unregister("tiny_llama")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(folder in Hugging Face format, the model as transformers loads it from the .gguf file), in fp32."""
    transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    pytest.importorskip("gguf", reason="pip install let-plugin[hf]")
    file = ROOT / "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        pytest.skip("make fetch-smollm2")
    from safetensors.torch import save_file

    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("smollm2")
    # A model that was loaded from GGUF counts as quantised, and refuses save_pretrained.
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = model.config.to_dict()
    content.pop("quantization_config", None)
    type(model.config)(**content).save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_equals_transformers(smollm2, build, config):
    folder, model = smollm2
    config.training.seq_len = 128
    assert_states_are_those_of(build(folder, "smollm2-135m"), model.model, [40, 60, 28])


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_as_a_language_model_equals_transformers(smollm2):
    folder, model = smollm2
    source = open_teacher(TeacherConfig(spec="smollm2-135m", path=str(folder)))
    logits_of = source.language_model(dtype=torch.float32, device=torch.device("cpu"), seq_len=16)
    tokens_1L = torch.arange(1000, 1016)[None]
    torch.testing.assert_close(logits_of(tokens_1L, None), model(input_ids=tokens_1L).logits, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_smollm2_is_not_taken_for_smollm(smollm2):
    with pytest.raises(ConfigError) as info:
        open_teacher(TeacherConfig(spec="smollm-135m", path=str(smollm2[0])))
    (problem,) = info.value.problems
    assert "rope_theta = 100000.0, the spec 10000.0; take 'smollm2-135m'" in problem.message
