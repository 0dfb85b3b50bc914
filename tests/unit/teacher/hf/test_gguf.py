"""Teachers in .gguf files: what is wrong with them is said; the real SmolLM2-135M (`make fetch-smollm2`)."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("gguf", reason="pip install let-plugin[hf]")

from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.demo import TOKENIZER
from let_plugin.preflight import teacher_cli
from tests.support.gguf_files import write_llama
from tests.support.hf_models import language_model, opened
from tests.support.problems import problem_of

SMOLLM2 = next(Path(__file__).parents[4].glob("assets/smollm2/*.gguf"), None)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="make fetch-smollm2")
@torch.no_grad()
def test_smollm2_predicts_english() -> None:
    source = opened(SMOLLM2)
    info = source.info
    assert (info.hidden_size, info.num_layers, info.vocab_size, info.max_seq_len) == (576, 30, 49152, 8192)
    assert (info.num_trunk_params, info.num_embedding_params) == (134_515_008, 49152 * 576)
    # "The Thames is a river in southern England. It flows through London and into the North Sea."
    document = [504, 30674, 314, 253, 4626, 281, 5677, 3996, 30, 657, 8634, 738, 4528, 284, 618, 260, 2601, 6427, 30]
    tokens_1L = torch.tensor([document])
    logits_1LV = language_model(source)(tokens_1L[:, :-1], None)
    assert F.cross_entropy(logits_1LV[0], tokens_1L[0, 1:]) < 3.0  # uniform: 10.8


def test_the_tokenizer_is_written_for_torchtitan(tmp_path) -> None:
    file = write_llama(tmp_path / "tiny.gguf")
    teacher_cli.main(["tokenizer", str(file), "--out", str(tmp_path / "tokenizer")])
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(tmp_path / "tokenizer"))
    demo = HuggingFaceTokenizer(tokenizer_path=TOKENIZER)
    text = "Late to early: 135 tokens,\n\tand more."
    assert tokenizer.encode(text, add_eos=True) == demo.encode(text, add_eos=True)
    assert tokenizer.get_vocab() == demo.get_vocab() == opened(file).vocabulary()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", None, "no such file"),
        ("a.gguf", b"", "truncated (0 bytes), damaged or of an unknown kind"),
        ("sha256-0123", b"GGML1234", "truncated (8 bytes)"),  # ollama's files have no ending
        ("a.gguf", 0.01, "truncated ("),
        ("sha256-0123", 0.98, "truncated ("),
    ],
)
def test_a_file_that_is_missing_truncated_or_no_gguf(tmp_path, name, content, message, capsys) -> None:
    file = tmp_path / name
    if isinstance(content, float):
        write_llama(file)
        content = file.read_bytes()[: int(content * file.stat().st_size)]
    if content is not None:
        file.write_bytes(content)
    problem = problem_of(opened, file)
    assert (problem.key, problem.value) == ("let.teacher.path", str(file)) and message in problem.message
    with pytest.raises(SystemExit, match="2"):
        teacher_cli.main(["tokenizer", str(file), "--out", str(tmp_path / "out")])
    assert f"let.teacher.path = '{file}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("attn_v", np.diag([-np.inf] * 8), "NaN or infinite values: model.layers.0.self_attn.v_proj.weight"),
        ("ffn_up", None, "lacks tensors that its configuration asks for: model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_tensors_that_are_wrong_are_named_when_they_are_read(tmp_path, name, weights, message) -> None:
    weights = weights if weights is None else weights.astype(np.float32)
    source = opened(write_llama(tmp_path / "tiny.gguf", **{f"blk_0_{name}": weights}))
    assert message in problem_of(language_model, source).message


@pytest.mark.parametrize("more", ["rope_freqs.weight", "blk.0.attn_q.bias", "llama.rope.scaling.type"])
def test_what_transformers_would_leave_out_is_refused(tmp_path, more) -> None:
    assert f"would leave out {more}" in problem_of(opened, write_llama(tmp_path / "a.gguf", more=more)).message


def test_a_path_that_cannot_be_read_and_a_package_that_is_not_there(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    os.symlink("/proc/self/mem", tmp_path / "memory.gguf")  # a real I/O error: a process's memory from its start
    assert "no such file" in problem_of(opened, tmp_path / "pipe.gguf").message
    assert "cannot be read: " in problem_of(opened, tmp_path / "memory.gguf").message
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the gguf package: pip install let-plugin[hf]" in problem_of(opened, tmp_path / "a.gguf").message
