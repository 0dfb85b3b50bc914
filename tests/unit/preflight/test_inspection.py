"""What `let-teacher inspect` says of each kind of teacher, and the number that it measures."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.preflight import teacher_cli as cli
from tests.support import hf_models

DEMO = [TEACHER, "--tokenizer", TOKENIZER]
TEXTS = ["A late train.", "The early bird catches the worm, or so they say in the north of England.", "É" * 40]


@pytest.fixture
def inspect(capsys):
    """Function that runs the command and returns what it said of each thing."""

    def inspect(*arguments):
        cli.main(["inspect", *map(str, arguments), "--device", "cpu"])
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    return inspect


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def measured(said):
    pattern = r"([\d.]+) nats per token, perplexity ([\d.]+), ([\d.]+) bits per byte, over ([\d,]+) tokens and ([\d,]+)"
    return [float(number.replace(",", "")) for number in re.search(pattern, said["loss"]).groups()]


@pytest.mark.parametrize("spec", [(), ("--spec", "demo_teacher")], ids=["transformers", "torchtitan"])
@torch.no_grad()
def test_the_loss_is_that_of_plain_transformers(inspect, text_file, spec):
    transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    from tokenizers import Tokenizer

    said = inspect(*DEMO, *spec, "--text", text_file)
    tokenizer = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    loss, num_tokens = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[0, *tokenizer.encode(text).ids]])  # 0 begins a document
        loss += F.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item()
        num_tokens += ids.shape[1] - 1
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    got_loss, perplexity, bits, got_tokens, got_bytes = measured(said)
    assert (got_tokens, got_bytes) == (num_tokens, num_bytes)
    assert got_loss == pytest.approx(loss / num_tokens, abs=2e-4)
    assert perplexity == pytest.approx(math.exp(loss / num_tokens), rel=1e-3)
    assert bits == pytest.approx(loss / math.log(2) / num_bytes, abs=2e-4)
    assert said["text"] == str(text_file)
    assert said["blocks"] == "4 of width 128, 2 heads"
    assert said["trunk"] == "1,328,256 parameters: 524,288 in embeddings, 803,968 that are multiplied"
    assert said["tokenizer"] == "4,096 tokens"


def test_what_a_spec_alone_and_a_checkpoint_without_a_tokenizer_say(inspect, tiny_teacher, text_file, capsys):
    said = inspect("--spec", "llama3:1B")
    assert said["blocks"] == "16 of width 2048, 32 heads (8 key-value)"
    assert said["trunk"].startswith("1,235,814,400 parameters: 262,668,288 in embeddings")  # Llama 3.2 1B's, tied
    assert said["weights"].startswith("none given") and "loss" not in said
    said = inspect(tiny_teacher[0], "--spec", "tiny_teacher")
    assert said["tokenizer"].startswith("none there") and "loss" not in said
    with pytest.raises(SystemExit, match="2"):
        inspect(tiny_teacher[0], "--spec", "tiny_teacher", "--text", text_file)
    assert "--tokenizer: missing; name a folder with the teacher's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "let.teacher.path = '/nowhere': there is no such folder"),
        (["--spec", "demo_teachr"], "did you mean 'demo_teacher'?"),
        ([TEACHER, "--tokenizer", "/nowhere"], "let.teacher.tokenizer_path = '/nowhere'"),
        ([TEACHER, "--max-tokens", "0"], "--max-tokens = 0"),
        (["--spec", "llama3:1B", "--import", "no_such_module"], "--import = 'no_such_module'"),
        (["{0}/phi", "--tokenizer", TOKENIZER], "it has ids up to 4095, the teacher 61 rows"),
        ([*DEMO, "--text", "{0}/none.txt"], "--text = '{0}/none.txt': no such file"),
        ([*DEMO, "--text", "{0}/blank.txt"], "--text = '{0}/blank.txt': there is nothing in it to predict"),
        ([*DEMO, "--text", "{0}/damaged.jsonl"], "--text = '{0}/damaged.jsonl': cannot be read"),
    ],
)
def test_bad_input_is_one_error(inspect, tmp_path, capsys, arguments, message):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    if "{0}/phi" in arguments:
        hf_models.save(tmp_path / "phi", hf_models.config_of("phi"))
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "damaged.jsonl").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        inspect(*(argument.format(tmp_path) for argument in arguments))
    *_, heading, problem = capsys.readouterr().err.splitlines()
    assert heading == "let-teacher inspect: 1 problem in the configuration"
    assert message.format(tmp_path) in problem
