"""GGUFTeacherSource and the tokenizer's command line, on the real SmolLM2-135M (`make fetch-smollm2`)."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
pytest.importorskip("gguf", reason="pip install let-plugin[hf]")

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.runtime import host
from let_plugin.teacher.hf import gguf as gguf_teacher
from let_plugin.teacher.hf.source import HFTeacherSource as GGUFTeacherSource
from tests.support import gguf_files


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of SmolLM2-135M as .gguf; skips where it has not been fetched."""
    if path := os.environ.get("LET_SMOLLM2_GGUF"):
        return path
    root = Path(__file__).resolve().parents[4]
    files = sorted(root.glob("assets/smollm2/*.gguf"))
    if not files:
        pytest.skip("make fetch-smollm2")
    return str(files[0])


@pytest.fixture(scope="module")
def source(smollm2: str) -> GGUFTeacherSource:
    return GGUFTeacherSource(TeacherConfig(path=smollm2))


@pytest.mark.slow
def test_info_and_vocabulary(source) -> None:
    info = source.info
    assert (info.hidden_size, info.num_layers, info.vocab_size, info.max_seq_len) == (576, 30, 49152, 8192)
    assert (info.num_trunk_params, info.num_embedding_params) == (134_515_008, 49152 * 576)
    assert info.num_params_to([0]) + sum(info.block_params[1:]) == info.num_trunk_params
    vocabulary = source.vocabulary()
    assert len(vocabulary) == 49152
    assert vocabulary["<|endoftext|>"] == 0
    assert vocabulary["<|im_end|>"] == 2


@pytest.mark.slow
@torch.no_grad()
def test_states_are_those_of_the_model(source, smollm2) -> None:
    """Against AutoModelForCausalLM as transformers loads it from the file: same states, and it predicts English."""
    from torchtitan.distributed import ParallelDims
    from transformers import AutoModelForCausalLM, AutoTokenizer

    host.set_up("cpu")
    rng_state = torch.get_rng_state()
    teacher = source.build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=None,
        parallel_dims=ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1),
        layers=[source.info.num_layers - 1],
        final_norm=True,
    )
    assert torch.equal(rng_state, torch.get_rng_state())
    assert sum(p.numel() for p in teacher.parameters()) == source.info.num_trunk_params
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}

    folder, name = os.path.split(smollm2)
    reference = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    text = "The Thames is a river in southern England. It flows through London and into the North Sea."
    document_1L = tokenizer(text, return_tensors="pt")["input_ids"]
    length = document_1L.shape[1]
    states_1LE = teacher(torch.cat([document_1L.roll(1), document_1L], 1), torch.arange(length).repeat(1, 2))
    torch.testing.assert_close(
        states_1LE[:, length:], reference.model(input_ids=document_1L).last_hidden_state, rtol=1e-3, atol=1e-3
    )
    logits_LV = reference.lm_head(states_1LE[0, length:-1])
    assert torch.nn.functional.cross_entropy(logits_LV, document_1L[0, 1:]) < 3.0  # uniform: 10.8


@pytest.mark.slow
def test_tokenizer_is_written_for_torchtitan(source, smollm2, tmp_path) -> None:
    host.set_up("cpu")
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    assert gguf_teacher.main([smollm2, "--tokenizer", str(tmp_path)]) == 0
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.tokenizer.get_vocab(with_added_tokens=True) == source.vocabulary()
    text = "Late to early: 135 tokens,\n\tand more."
    token_ids = tokenizer.encode(text, add_bos=False, add_eos=True)
    assert token_ids[-1] == 2
    assert tokenizer.decode(token_ids[:-1]) == text


@pytest.mark.parametrize("content", [None, b"", b"GGML1234", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\x01" * 40])
def test_file_that_is_missing_or_not_gguf(tmp_path, content, capsys) -> None:
    file = tmp_path / "teacher.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"let\.teacher\.path.*(no such file|not a GGUF file|truncated)"):
        GGUFTeacherSource(TeacherConfig(path=str(file)))
    assert gguf_teacher.main([str(file), "--tokenizer", str(tmp_path / "out")]) == 2
    assert "error: let.teacher.path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.01, 0.98])
def test_truncated_file(smollm2, tmp_path, kept) -> None:
    content = Path(smollm2).read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigError, match=rf"truncated \({len(content[: int(kept * len(content))])} bytes\)"):
        GGUFTeacherSource(TeacherConfig(path=str(file)))


def message_of(path: str, *, load: bool = False) -> str:
    """What is wrong with a teacher when it is opened or, with `load`, only when it is loaded."""
    with pytest.raises(ConfigError) as info:
        source = GGUFTeacherSource(TeacherConfig(path=path))
        assert load
        source.language_model(dtype=torch.float32, device=torch.device("cpu"), seq_len=8)
    (problem,) = info.value.problems
    assert (problem.key, problem.value) == ("let.teacher.path", path)
    return problem.message


def test_a_tensor_that_is_missing_is_named_when_it_is_opened(tmp_path) -> None:
    file = gguf_files.write_llama(tmp_path / "tiny.gguf", blk_0_ffn_up=None)
    assert message_of(file).endswith("asks for: layers.0.mlp.up_proj.weight")


def test_a_path_that_cannot_be_read_as_a_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert message_of(str(tmp_path / "folder.gguf")).startswith("no such file (or it is a folder or a pipe)")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert message_of(str(tmp_path / "pipe.gguf")).startswith("no such file (or it is a folder or a pipe)")
    # A real I/O error: reading a process's memory from its start.
    os.symlink("/proc/self/mem", tmp_path / "memory.gguf")
    assert message_of(str(tmp_path / "memory.gguf")).startswith("the file cannot be read: [Errno 5]")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value) -> None:
    weights = np.ones((8, 8), np.float32)
    weights[3, 5] = value
    file = gguf_files.write_llama(tmp_path / "tiny.gguf", blk_0_attn_v=weights)
    assert "NaN or infinite values: model.layers.0.self_attn.v_proj.weight" in message_of(file, load=True)


def test_tensors_of_another_shape_are_named(tmp_path) -> None:
    file = gguf_files.write_llama(tmp_path / "tiny.gguf", blk_0_ffn_up=np.ones((8, 8), np.float32))
    message = message_of(file, load=True)
    assert "layers.0.mlp.up_proj.weight (file (8, 8), configuration (16, 8))" in message


def test_gguf_is_not_installed(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(gguf_teacher, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ConfigError, match=r"needs the gguf package: pip install let-plugin\[hf\]"):
        GGUFTeacherSource(TeacherConfig(path=str(tmp_path / "teacher.gguf")))
