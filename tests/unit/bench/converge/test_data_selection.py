"""A tiny corpus, scored by two real models and by transformers directly."""

import json

import pytest
import torch
import torch.nn.functional as F

from let_plugin.bench.converge import data_selection
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


def test_the_documents_that_the_teacher_finds_easier(corpus, tmp_path, capsys):
    config, texts, reference = corpus
    out = tmp_path / "kept.jsonl.xz"
    option = f'{{path = "{reference}", tokenizer_path = "{TOKENIZER}"}}'
    assert data_selection.main([str(config), "--reference", option, "--out", str(out)]) == 0
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
    content = json.loads(data_selection.costs_path(out).read_text())
    assert content["lowest_score_kept"] == pytest.approx(min(scores[i] for i in best), abs=2e-3)

    # Nothing is overwritten.
    assert data_selection.main([str(config), "--reference", option, "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--reference", "nowhere", "--out", "x.jsonl"], "nowhere"),
        (["--reference", "{path = ", "--out", "x.jsonl"], "--reference"),
        (["--reference", "{pth = 'x'}", "--out", "x.jsonl"], "--reference.pth"),
        (["--reference", TEACHER, "--out", "x.txt"], "--out"),
        (["--reference", TEACHER, "--out", "x.jsonl", "--keep", "1.5"], "--keep"),
    ],
)
def test_mistakes(corpus, tmp_path, capsys, monkeypatch, arguments, key):
    monkeypatch.chdir(tmp_path)
    assert data_selection.main([str(corpus[0]), *arguments]) == 2
    assert key in capsys.readouterr().err and not list(tmp_path.glob("x.*"))


def test_a_file_that_is_no_selection(tmp_path):
    with pytest.raises(ConfigError, match="--selected-text"):
        data_selection.read_costs(tmp_path / "text.jsonl")
