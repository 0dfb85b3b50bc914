"""A tiny corpus, scored by two real models and by transformers directly."""

import json

import pytest
import torch
import torch.nn.functional as F

from let_plugin.bench import cli
from let_plugin.bench.converge import data_selection
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.runtime import data


def mean_nll(model, ids):
    """Of a document. Each part of 4 tokens is predicted from itself alone."""
    parts = [ids[start : start + 5] for start in range(0, len(ids) - 1, 4)]
    with torch.no_grad():
        losses = [F.cross_entropy(model(part[None, :-1]).logits[0], part[1:], reduction="sum") for part in parts]
    return sum(losses).item() / (len(ids) - 1)


def test_the_documents_that_the_teacher_finds_easier(config_file, tmp_path, capsys, monkeypatch):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    texts = [f"{start} {end}." for start in ("The river flows to", "An", "zq xk vv", "In 1912 it was") for end in "ab"]
    corpus, reference, out = (tmp_path / name for name in ("text.jsonl", "reference", "kept.jsonl.xz"))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    models = [transformers.AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32) for _ in range(2)]
    torch.manual_seed(0)
    for parameter in models[1].parameters():  # the teacher with noise
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    models[1].save_pretrained(reference)

    monkeypatch.setattr(data_selection, "_BATCH_TOKENS", 12)  # three parts at a time, of one document or of several
    own = f"--dataloader.dataset text_files --dataloader.dataset_path {corpus} --training.seq_len 4"
    own += f" --let.teacher.path {TEACHER} --let.teacher.spec demo_teacher --let.teacher.tokenizer_path {TOKENIZER}"
    command = ["select", str(config_file), *own.split(), "--reference"]
    option = f"--let.teacher.spec '' --let.teacher.path {reference}"
    cli.main([*command, option, "--out", str(out)])
    assert f"wrote {out}: 4 of 8 documents" in capsys.readouterr().out

    tokenizer = HuggingFaceTokenizer(tokenizer_path=TOKENIZER)
    documents = [torch.tensor(tokenizer.encode(text, add_bos=True, add_eos=True)) for text in texts]
    scores = [mean_nll(models[1], ids) - mean_nll(models[0], ids) for ids in documents]
    num_tokens = sum(len(ids) - 1 for ids in documents)
    assert num_tokens > 4 * len(texts)  # there are documents of two parts
    best = sorted(range(8), key=lambda i: -scores[i])[:4]
    assert sorted(scores)[4] - sorted(scores)[3] > 1e-3  # the choice is clear
    assert [row["text"] for row in data.load_text_files(str(out))] == [texts[i] for i in sorted(best)]
    costs = json.loads(data_selection.costs_file(out).read_text())
    # Multiplied: 4 blocks of the demo's teacher, the final norm and the head.
    num_params = 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128 + 4096 * 128
    assert costs["tokens"] == 2 * num_tokens and costs["flops"] == 2 * (2 * num_params) * num_tokens
    assert costs["seconds"] > 0

    # Each mistake by its name, and nothing is written.
    monkeypatch.chdir(tmp_path)
    for arguments, key in (
        ([option, "--out", str(out)], "--out"),  # is there
        (["nowhere", "--out", "x.jsonl"], "nowhere"),
        (["--let.teacher.pth x", "--out", "x.jsonl"], "let.teacher.pth"),
        ([TEACHER, "--out", "x.txt"], "--out = 'x.txt': must end in"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, *arguments])
        assert key in capsys.readouterr().err and not list(tmp_path.glob("x.*"))
