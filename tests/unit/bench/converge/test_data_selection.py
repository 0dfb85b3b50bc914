"""A tiny corpus, scored by two real models and by transformers directly."""

import json

import pytest
import torch
import torch.nn.functional as F

from let_plugin.bench.converge import data_selection
from let_plugin.bench.converge.data_selection import kept
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.runtime import data

TOML = """\
base = "tests.support.tiny"
dump_folder = "{folder}/out"

[runtime]
device = "cpu"

[let]
teacher.spec = "demo_teacher"

[training]
seq_len = 4

[dataloader]
dataset = "text_files"
dataset_path = "{folder}/text.jsonl"
"""


@pytest.fixture
def corpus(tmp_path):
    """(TOML file, documents, folder of a reference model: the teacher with noise)."""
    transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    starts = ("The river flows to", "An", "zq xk vv", "In 1912 it was")
    texts = [f"{start} {end}." for start in starts for end in ("sea", "old cat")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "run.toml").write_text(TOML.format(folder=tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "reference")
    return tmp_path / "run.toml", texts, tmp_path / "reference"


def mean_nll(folder, text):
    """Of a document, and the number of its tokens. Each part of 4 tokens is predicted from itself alone."""
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(HuggingFaceTokenizer(tokenizer_path=TOKENIZER).encode(text, add_bos=True, add_eos=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, num_tokens = 0.0, len(ids) - 1
    with torch.no_grad():
        for start in range(0, num_tokens, 4):
            part = ids[start : start + 5]
            total += F.cross_entropy(model(part[None, :-1]).logits[0], part[1:], reduction="sum").item()
    return total / num_tokens, num_tokens


def test_the_documents_that_the_teacher_finds_easier(corpus, tmp_path, capsys, monkeypatch):
    config, texts, reference = corpus
    monkeypatch.setattr(data_selection, "_BATCH_TOKENS", 12)  # three parts at a time, of one document or of several
    out = tmp_path / "kept.jsonl.xz"
    option = f"--let.teacher.spec '' --let.teacher.path {reference} --let.teacher.tokenizer_path {TOKENIZER}"
    data_selection.main([str(config), "--reference", option, "--out", str(out)])
    assert f"wrote {out}: 4 of 8 documents" in capsys.readouterr().out

    scores, num_tokens = [], 0
    for text in texts:
        reference_nll, count = mean_nll(reference, text)
        scores.append(reference_nll - mean_nll(TEACHER, text)[0])
        num_tokens += count
    assert num_tokens > 4 * len(texts)  # there are documents of two parts
    best = sorted(range(8), key=lambda i: -scores[i])[:4]
    assert sorted(scores)[4] - sorted(scores)[3] > 1e-3  # the choice is clear
    assert [row["text"] for row in data.load_text_files(str(out))] == [texts[i] for i in sorted(best)]

    costs = data_selection.read_costs(out)
    # Multiplied: 4 blocks of the demo's teacher, the final norm and the head.
    num_params = 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128 + 4096 * 128
    assert costs["tokens"] == 2 * num_tokens and costs["flops"] == 2 * (2 * num_params) * num_tokens
    assert costs["seconds"] > 0

    # Each mistake by its name, and nothing is written.
    monkeypatch.chdir(tmp_path)
    for arguments, key in (
        (["--reference", option, "--out", str(out)], "--out"),  # is there
        (["--reference", "nowhere", "--out", "x.jsonl"], "nowhere"),
        (["--reference", "--let.teacher.pth x", "--out", "x.jsonl"], "let.teacher.pth"),
        (["--reference", TEACHER, "--out", "x.txt", "--keep", "1.5"], "--keep = 1.5: must be between"),
    ):
        with pytest.raises(SystemExit, match="2"):
            data_selection.main([str(config), *arguments])
        assert key in capsys.readouterr().err and not list(tmp_path.glob("x.*"))
    with pytest.raises(ConfigError, match="--selected-text"):
        data_selection.read_costs(tmp_path / "text.jsonl")


def test_of_equal_scores_the_first_are_kept():
    assert kept([1.0, 2.0, 2.0, 2.0, 0.0, 3.0], 0.5) == {1, 2, 5}
    assert kept([1.0], 0.05) == {0}
