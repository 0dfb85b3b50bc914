"""HFTeacher against transformers itself, one document at a time; and every mistake that its source has to report.

Shape legend: B batch, L sequence, E teacher width.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

from torchtitan.distributed import ParallelDims  # noqa: E402

from let_plugin.alignment.layer_mapping import EMBEDDING  # noqa: E402
from let_plugin.config import TeacherConfig  # noqa: E402
from let_plugin.config.errors import ConfigError  # noqa: E402
from let_plugin.teacher.hf.source import HFTeacher, HFTeacherSource  # noqa: E402
from let_plugin.teacher.sharding import teacher_parallel_dims  # noqa: E402

ONE_RANK = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "world_size": 1}
VOCAB_SIZE = 61
SEQ_LEN = 24
DROPOUT = 0.25
WINDOW = 5  # shorter than the longest document, so that a lost window shows
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_OPT = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


def _model_configs() -> dict:
    configs = {
        "llama": transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
        "llama3_rope": transformers.LlamaConfig(
            **{**_GROUPED, "max_position_embeddings": 128},
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        "gpt2": transformers.GPT2Config(**_GPT2),
        "opt": transformers.OPTConfig(**_OPT, ffn_dim=48, word_embed_proj_dim=32),
        "opt_350m_like": transformers.OPTConfig(**_OPT, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
        "gpt_neox": transformers.GPTNeoXConfig(**_COMMON),
        "gptj": transformers.GPTJConfig(**_GPT2, rotary_dim=4),
        "qwen2": transformers.Qwen2Config(
            **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
        ),
        "qwen3": transformers.Qwen3Config(**_GROUPED, head_dim=8),
        "mistral": transformers.MistralConfig(**_GROUPED, sliding_window=WINDOW),
        "phi": transformers.PhiConfig(**_GROUPED),
        "phi3": transformers.Phi3Config(**_GROUPED, sliding_window=WINDOW),
        "gemma": transformers.GemmaConfig(**_GROUPED, head_dim=8),
        "gemma2": transformers.Gemma2Config(**_GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW),
        "gemma3": transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=WINDOW),
        "olmoe": transformers.OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2),
    }
    for config in configs.values():
        for name in dropout_fields(config.to_dict()):  # so that what is compared below is wrong unless it is off
            setattr(config, name, DROPOUT)
    return configs


def dropout_fields(content: dict) -> list[str]:
    """The fields of a configuration that make something stochastic in training."""
    return [name for name, value in content.items() if "drop" in name and type(value) in (int, float)]


FAMILIES = tuple(_model_configs())


def save_model(folder: Path, model_config) -> Path:
    """A random model, with its language-model head, as safetensors in `folder`; weights large enough to see leaks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(model_config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: save_model(root / name, config) for name, config in _model_configs().items()}


@pytest.fixture
def llama(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the llama teacher, to damage."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "llama"))


def build(
    source: HFTeacherSource,
    dtype: torch.dtype = torch.float32,
    layers=None,
    final_norm: bool = True,
    parallel_dims=None,
) -> HFTeacher:
    """The teacher; of its last layer unless `layers` says otherwise."""
    parallel_dims = parallel_dims or teacher_parallel_dims(ParallelDims(**ONE_RANK))
    return source.build(
        dtype=dtype,
        device=torch.device("cpu"),
        config=None,
        parallel_dims=parallel_dims,
        layers=[source.info.num_layers - 1] if layers is None else layers,
        final_norm=final_norm,
    )


@pytest.fixture
def one_rank(parallel_dims):
    """The teacher's meshes of one process, with the process group that they stand on."""
    dims = teacher_parallel_dims(parallel_dims)
    dims.build_mesh()
    return dims


def reference_of(folder: Path):
    """The model as transformers itself runs it."""
    content = json.loads((folder / "config.json").read_text())
    attention = "sdpa" if content.get("attn_logit_softcapping") is None else "eager"  # SDPA has no soft cap
    return transformers.AutoModel.from_pretrained(folder, attn_implementation=attention).eval()


def source_of(path: Path | str, **fields) -> HFTeacherSource:
    return HFTeacherSource(TeacherConfig(path=str(path), **fields))


def problems_of(path: Path | str, *, load: bool = False, **fields) -> str:
    """The text of the ConfigError that the source (or, with `load`, its build) must raise."""
    if load:
        source = source_of(path, **fields)
        with pytest.raises(ConfigError) as error:
            build(source)
    else:
        with pytest.raises(ConfigError) as error:
            source_of(path, **fields)
    return str(error.value)


def packed_batch() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """tokens_BL, positions_BL and the documents' lengths: 3 boundaries, at other places in each row."""
    lengths = [[7, 12, 5], [1, 3, 20]]
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(VOCAB_SIZE, (2, SEQ_LEN), generator=generator)
    positions_BL = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return tokens_BL, positions_BL, lengths


class NoHostSync(TorchDispatchMode):
    """Fails where a tensor's value is read on the host: there an accelerator would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor is read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents_equal_each_document_alone(folders, family) -> None:
    tokens_BL, positions_BL, lengths = packed_batch()
    teacher = build(source_of(folders[family]))
    with NoHostSync():
        states_BLE = teacher(tokens_BL, positions_BL)
        whole_rows_BLE = teacher(tokens_BL, None)

    reference = reference_of(folders[family])
    torch.testing.assert_close(whole_rows_BLE, reference(input_ids=tokens_BL).last_hidden_state, rtol=1e-4, atol=1e-5)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            document = slice(start, start + length)
            expected_1LE = reference(input_ids=tokens_BL[row : row + 1, document]).last_hidden_state
            torch.testing.assert_close(states_BLE[row, document], expected_1LE[0], rtol=1e-4, atol=1e-5)
            start += length


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_document_does_not_see_the_others(folders, family) -> None:
    tokens_BL, positions_BL, lengths = packed_batch()
    teacher = build(source_of(folders[family]))
    before_BLE = teacher(tokens_BL, positions_BL)
    tokens_BL[0, : lengths[0][0]] += 1  # the first document of row 0
    tokens_BL %= VOCAB_SIZE
    after_BLE = teacher(tokens_BL, positions_BL)
    first = lengths[0][0]
    assert (after_BLE[0, :first] - before_BLE[0, :first]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(after_BLE[0, first:], before_BLE[0, first:], rtol=0, atol=1e-6)
    torch.testing.assert_close(after_BLE[1], before_BLE[1], rtol=0, atol=1e-6)


# Layers


def states_by_layer(reference, tokens_BL: torch.Tensor) -> dict:
    """What transformers returns for the embedding and each block, without the final norm; and, as "final", with it."""
    last_block = next(module for module in reference.modules() if isinstance(module, torch.nn.ModuleList))[-1]
    raw = []
    handle = last_block.register_forward_hook(
        lambda module, args, output: raw.append(output[0] if isinstance(output, tuple) else output)
    )
    states = reference(input_ids=tokens_BL, output_hidden_states=True).hidden_states
    handle.remove()
    embedding, *blocks, final = states
    return {EMBEDDING: embedding, **dict(enumerate(blocks)), len(blocks): raw[0], "final": final}


def num_hooks(teacher: HFTeacher) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_of_each_layer_are_those_of_transformers(folders, family) -> None:
    tokens_BL, _, _ = packed_batch()
    source = source_of(folders[family])
    expected = states_by_layer(reference_of(folders[family]), tokens_BL)
    for layer, num_blocks in ((EMBEDDING, 1), (0, 1), (1, 2), (2, 3), ("final", 3)):
        final_norm = layer == "final"
        asked = 2 if final_norm else layer
        teacher = build(source, layers=[asked], final_norm=final_norm)
        states_BLE = teacher(tokens_BL, None)
        torch.testing.assert_close(states_BLE, expected[layer], rtol=1e-5, atol=1e-5)
        assert states_BLE.shape[-1] == source.info.width(asked, final_norm)
        assert num_hooks(teacher) == (0 if final_norm else 1)
        num_params = sum(parameter.numel() for parameter in teacher.parameters())
        assert num_params == source.info.num_params_to([asked])
        assert num_params == source.info.num_trunk_params - sum(source.info.block_params[num_blocks:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[1, EMBEDDING, 0], [2, 0]])
@torch.no_grad()
def test_several_layers_in_the_order_asked_for_over_packed_documents(folders, family, layers) -> None:
    tokens_BL, positions_BL, lengths = packed_batch()
    source = source_of(folders[family])
    teacher = build(source, layers=layers)
    states_BLE = teacher(tokens_BL, positions_BL)
    assert torch.equal(states_BLE, teacher(tokens_BL, positions_BL))
    assert states_BLE.shape[-1] == sum(source.info.width(layer, True) for layer in layers)
    assert sum(p.numel() for p in teacher.parameters()) == source.info.num_params_to(layers)
    reference = reference_of(folders[family])
    for row, row_lengths in enumerate(lengths):
        for document in torch.arange(SEQ_LEN).split(row_lengths):
            expected = states_by_layer(reference, tokens_BL[row : row + 1, document])
            expected_1LE = torch.cat([expected["final" if layer == 2 else layer] for layer in layers], -1)
            torch.testing.assert_close(states_BLE[row, document], expected_1LE[0], rtol=1e-4, atol=1e-5)


def test_a_leak_between_documents_is_found_in_the_layers_that_are_asked_for(llama, monkeypatch) -> None:
    from let_plugin.teacher.hf import attention as hf_attention

    monkeypatch.setattr(hf_attention.DocumentMask, "get", lambda *_: None)
    build(source_of(llama), layers=[EMBEDDING])
    with pytest.raises(ConfigError, match="depend on the document before it"):
        build(source_of(llama), layers=[EMBEDDING, 0])


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="a newer transformers has it")
def test_blocks_that_run_in_loops_are_not_cut_apart(tmp_path) -> None:
    """Dory runs its blocks 1 and 2 twice, then block 3: without block 2, block 1 would see something else."""
    fields = {**_GROUPED, "num_hidden_layers": 4, "head_dim": 8}
    config = transformers.DoryConfig(**fields, n_input_layers=1, n_output_layers=1, n_recurrent_loops=2)
    save_model(tmp_path, config)
    reference = reference_of(tmp_path)
    tokens_BL, _, _ = packed_batch()
    with torch.no_grad():
        states = []
        for block in reference.layers:
            block.register_forward_hook(lambda module, args, output: states.append(output))
        final = reference(input_ids=tokens_BL).last_hidden_state
        torch.testing.assert_close(build(source_of(tmp_path))(tokens_BL, None), final, rtol=1e-4, atol=1e-5)
        expected = torch.cat([states[4], states[0]], -1)  # the blocks run in the order 0 1 2 1 2 3
        teacher = build(source_of(tmp_path), layers=[2, 0])
        torch.testing.assert_close(teacher(tokens_BL, None), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"let\.pairs = \[1\].*depend on blocks behind them"):
        build(source_of(tmp_path), layers=[1])


def test_info(folders) -> None:
    info = source_of(folders["llama"]).info
    model = transformers.AutoModel.from_pretrained(folders["llama"])
    assert (info.hidden_size, info.num_layers, info.vocab_size, info.max_seq_len) == (32, 3, VOCAB_SIZE, 64)
    assert info.num_trunk_params == sum(p.numel() for p in model.parameters())
    assert info.num_embedding_params == VOCAB_SIZE * 32
    assert info.block_params == tuple(sum(p.numel() for p in block.parameters()) for block in model.layers)
    assert "llama" in info.description
    gpt2 = source_of(folders["gpt2"]).info
    assert gpt2.num_embedding_params == (VOCAB_SIZE + 64) * 32  # its positions are an embedding as well
    opt = source_of(folders["opt_350m_like"]).info
    assert opt.hidden_size == opt.width(2, True) == 16
    assert opt.width(2, False) == opt.width(1, True) == opt.width(EMBEDDING, True) == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_teacher_is_frozen_headless_and_leaves_the_rng(folders, dtype) -> None:
    rng_state = torch.get_rng_state()
    source = source_of(folders["llama"])
    teacher = build(source, dtype)
    assert torch.equal(rng_state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert sum(p.numel() for p in teacher.parameters()) == source.info.num_trunk_params
    assert all(p.dtype == dtype and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert not [name for name, _ in teacher.named_modules() if "head" in name]
    tokens_BL, positions_BL, _ = packed_batch()
    states_BLE = teacher(tokens_BL, positions_BL)
    assert states_BLE.shape == (2, SEQ_LEN, 32)
    assert states_BLE.dtype == dtype
    assert not states_BLE.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dropout_is_off(folders, family) -> None:
    content = json.loads((folders[family] / "config.json").read_text())
    assert {content[name] for name in dropout_fields(content)} == {DROPOUT}
    teacher = build(source_of(folders[family]))
    tokens_BL, positions_BL, _ = packed_batch()
    expected_BLE = teacher(tokens_BL, positions_BL)
    assert torch.equal(teacher(tokens_BL, positions_BL), expected_BLE)
    teacher.train()
    # The soft-capped attention is our own (hf_attention.py), and knows no dropout.
    assert torch.allclose(teacher(tokens_BL, positions_BL), expected_BLE) == (family == "gemma2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_buffer_is_that_of_from_pretrained(folders, tmp_path, family, dtype) -> None:
    """From one file, and from several with an index."""
    expected = transformers.AutoModel.from_pretrained(folders[family], dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[family])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for folder in (folders[family], tmp_path):
        trunk = build(source_of(folder), dtype).trunk
        for named in ("named_parameters", "named_buffers"):
            tensors = dict(getattr(trunk, named)())
            assert tensors.keys() == dict(getattr(expected, named)()).keys()
            for name, tensor in getattr(expected, named)():
                torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


def test_sharded_checkpoint(folders, tmp_path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens_BL, positions_BL, _ = packed_batch()
    states_BLE = build(source_of(tmp_path))(tokens_BL, positions_BL)
    assert torch.equal(states_BLE, build(source_of(folders["llama"]))(tokens_BL, positions_BL))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"names files that are not there: {shard.name}; fetch them" in problems_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "index.json cannot be read" in problems_of(tmp_path)


# Vocabulary


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<eos>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_vocabulary(llama, tmp_path) -> None:
    expected = {"a": 0, "b": 1, "[UNK]": 2, "<eos>": 3}
    assert source_of(llama).vocabulary() is None
    _save_tokenizer(tmp_path / "tokenizer")
    assert source_of(llama, tokenizer_path=str(tmp_path / "tokenizer")).vocabulary() == expected
    _save_tokenizer(llama)
    assert source_of(llama).vocabulary() == expected
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"let.teacher.path.*tokenizer.json cannot be read"):
        source_of(llama).vocabulary()
    with pytest.raises(ConfigError, match=r"let.teacher.tokenizer_path.*no tokenizer there"):
        source_of(llama, tokenizer_path=str(tmp_path / "nowhere")).vocabulary()


def test_vocabulary_of_a_tokenizer_without_tokenizer_json(llama) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    (llama / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (llama / "merges.txt").write_text("#version: 0.2\na b\n")
    (llama / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    vocabulary = source_of(llama).vocabulary()
    assert vocabulary is not None
    assert vocabulary["ab"] == 5


# Mistakes


def test_transformers_is_not_installed(llama, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install let-plugin[hf]" in problems_of(llama)


def test_no_such_path(tmp_path) -> None:
    text = problems_of(tmp_path / "absent")
    assert "let.teacher.path" in text
    assert "no such folder" in text
    assert "not a GGUF file" in problems_of(__file__)


def test_hub_name_that_cannot_be_had(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = problems_of("let-plugin-no-such-org/no-such-model")
    assert "no local folder of that name either" in text


@torch.no_grad()
def test_hub_name_in_the_hub_clients_cache(folders, tmp_path, monkeypatch) -> None:
    repository = tmp_path / "models--org--name"
    shutil.copytree(folders["llama"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = source_of("org/name")
    assert "hub org/name (in the cache)" in source.info.description
    batch = packed_batch()[:2]
    assert torch.equal(build(source)(*batch), build(source_of(folders["llama"]))(*batch))
    shutil.rmtree(repository)
    assert "not in the hub client's cache" in problems_of("org/name")


def test_folder_without_config_and_weights(tmp_path) -> None:
    text = problems_of(tmp_path)  # both mistakes at once
    assert "no config.json" in text
    assert "no model.safetensors" in text


def test_config_json_is_damaged(llama) -> None:
    (llama / "config.json").write_text("{")
    assert "config.json cannot be read" in problems_of(llama)


def test_pickled_weights_are_refused(llama) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    text = problems_of(llama)
    assert "pickled" in text
    assert "save_pretrained" in text


def test_remote_code_is_refused(llama) -> None:
    edit_config(llama, model_type="my_own", auto_map={"AutoConfig": "configuration_my_own.MyConfig"})
    assert "let.teacher.trust_remote_code = False" in problems_of(llama)


def test_unknown_model_type(llama) -> None:
    edit_config(llama, model_type="my_own")
    assert "knows no model_type 'my_own'" in problems_of(llama)


def test_quantised_weights_are_refused(llama) -> None:
    edit_config(llama, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "quantized" in problems_of(llama)


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
def test_architectures_that_cannot_be_a_teacher(tmp_path, config_class, fields, reason) -> None:
    getattr(transformers, config_class)(**fields).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert reason in problems_of(tmp_path)


def test_a_leak_that_only_shows_when_run_is_refused(llama, monkeypatch) -> None:
    from let_plugin.teacher.hf import attention as hf_attention

    monkeypatch.setattr(hf_attention.DocumentMask, "get", lambda *_: None)
    assert "depend on the document before it" in problems_of(llama, load=True)


def test_a_window_that_the_family_does_not_hand_on_is_refused(tmp_path) -> None:
    config = transformers.Qwen2MoeConfig(
        **_GROUPED, num_experts=2, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    )
    save_model(tmp_path, config)
    assert "sliding window" in problems_of(tmp_path, load=True)


# Damaged weights


def edit_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_weights(folder: Path, edit) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def test_missing_tensor_is_named(llama) -> None:
    edit_weights(llama, lambda tensors: {k: v for k, v in tensors.items() if "1.mlp.up_proj" not in k})
    assert "lacks tensors that its configuration asks for: layers.1.mlp.up_proj.weight" in problems_of(llama)


def test_mismatching_tensor_is_named(llama) -> None:
    edit_config(llama, intermediate_size=56)
    text = problems_of(llama)
    assert "layers.0.mlp.down_proj.weight (file (32, 48), configuration (32, 56))" in text


def test_a_tensor_of_another_kind_is_named(llama) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(llama, lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    assert "layers.0.mlp.down_proj.weight (file integers, configuration floating-point numbers)" in problems_of(llama)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_tensors_that_are_not_finite_are_named(llama, value) -> None:
    def spoil(tensors):
        for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
            tensors[name][-1, 3] = value
        return tensors

    edit_weights(llama, spoil)
    names = "layers.0.mlp.down_proj.weight, layers.1.self_attn.q_proj.weight"
    assert f"these tensors hold NaN or infinite values: {names}; fetch" in problems_of(llama, load=True)


def test_a_number_too_large_for_the_teachers_data_type_is_named(llama) -> None:
    name = "model.norm.weight"
    edit_weights(llama, lambda tensors: {**tensors, name: tensors[name].double() * 1e300})
    assert "NaN or infinite values: norm.weight" in problems_of(llama, load=True)


def test_a_file_that_shrinks_after_its_header_was_read(llama) -> None:
    source = source_of(llama)
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"its weights cannot be read: SafetensorError"):
        build(source)


def test_experts_that_do_not_combine_are_named(folders, tmp_path) -> None:
    folder = Path(shutil.copytree(folders["olmoe"], tmp_path / "olmoe"))
    edit_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if "experts.3.gate_proj" not in k})
    text = problems_of(folder)
    assert "mlp.experts.gate_up_proj" in text
    assert "not as its configuration says" in text


def test_surplus_layers_are_named(llama) -> None:
    edit_config(llama, num_hidden_layers=2)
    text = problems_of(llama)
    assert "more layers than its configuration (2)" in text
    assert "layers.2." in text


def test_truncated_weights_are_named(llama) -> None:
    file = llama / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert "model.safetensors is truncated" in problems_of(llama)
    for damaged in (b"", b"123", content[:50], b"x" * 100, (2).to_bytes(8, "little") + b"[]" + b"x"):
        file.write_bytes(damaged)
        assert "model.safetensors is " in problems_of(llama)
