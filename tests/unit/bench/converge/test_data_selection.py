"""A tiny corpus, scored by two real models and by transformers directly."""

import json

import pytest
import torch
import torch.nn.functional as F

from let_plugin.bench.converge import data_selection
from let_plugin.bench.converge.data_selection import document_losses, kept
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
seq_len = 64

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
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(HuggingFaceTokenizer(tokenizer_path=TOKENIZER).encode(text, add_bos=True, add_eos=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).item(), len(ids) - 1


def test_the_documents_that_the_teacher_finds_easier(corpus, tmp_path, capsys, monkeypatch):
    config, texts, reference = corpus
    out = tmp_path / "kept.jsonl.xz"
    option = f"--let.teacher.spec '' --let.teacher.path {reference} --let.teacher.tokenizer_path {TOKENIZER}"
    data_selection.main([str(config), "--reference", option, "--out", str(out)])
    assert f"wrote {out}: 4 of 8 documents" in capsys.readouterr().out

    scores, num_tokens = [], 0
    for text in texts:
        reference_nll, count = mean_nll(reference, text)
        scores.append(reference_nll - mean_nll(TEACHER, text)[0])
        num_tokens += count
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


VOCAB_SIZE = 17
TABLE_VV = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def causal_model(tokens_BL, positions_BL):
    """Logits that depend on all tokens of the row up to each, and on their number."""
    counts_L = torch.arange(1, tokens_BL.shape[1] + 1)
    return TABLE_VV[tokens_BL].cumsum(dim=1) / counts_L[:, None]


@pytest.mark.parametrize("batch_tokens", [1, 24])
def test_each_document_by_itself(monkeypatch, batch_tokens):
    monkeypatch.setattr(data_selection, "_BATCH_TOKENS", batch_tokens)
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 9, 8, 25, 2, 17]
    documents = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    found = list(document_losses(causal_model, documents, seq_len=8, vocab_size=VOCAB_SIZE, device="cpu"))
    assert [count for _, count in found] == [n - 1 for n in lengths]
    for document, (loss, _) in zip(documents, found, strict=True):
        expected = 0.0
        for start in range(0, len(document) - 1, 8):  # each part predicted from itself alone
            part = torch.tensor(document[start : start + 9])
            logits_LV = causal_model(part[None, :-1], None)[0]
            expected += F.cross_entropy(logits_LV, part[1:], reduction="sum").item()
        assert loss == pytest.approx(expected, abs=1e-4)


def test_of_equal_scores_the_first_are_kept():
    assert kept([1.0, 2.0, 2.0, 2.0, 0.0, 3.0], 0.5) == {1, 2, 5}
    assert kept([1.0], 0.05) == {0}
