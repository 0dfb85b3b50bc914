"""`let-bench eval`, end to end: a checkpoint of the demo's teacher, on a task made of the demo's held-out text."""

import json
import lzma
import random

import pytest
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from let_plugin.bench import rows
from let_plugin.demo import TEACHER, TEXT
from tests.support import jobs
from tests.support.config_registry import demo_teacher

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval", reason="pip install let-plugin[eval]")

NUM_DOCUMENTS = 40
TASK = """\
task: let_continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
    fewshot: {file}
test_split: test
fewshot_split: fewshot
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The weights that are shipped in Hugging Face's format, as torchtitan would have saved them."""
    spec = demo_teacher().model_spec
    adapter = spec.state_dict_adapter(spec.model, None)
    folder = tmp_path_factory.mktemp("checkpoint") / "step-1"
    dcp.save(adapter.from_hf(load_file(f"{TEACHER}/model.safetensors")), checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with one task: how a held-out text goes on, or that with two words exchanged."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)
    lines = []
    with lzma.open(TEXT["test"], "rt") as file:
        texts = [json.loads(line)["text"].split() for line in file]
    for words in [words for words in texts if len(words) >= 30][:NUM_DOCUMENTS]:
        true = words[15:25]
        place, label = generator.randrange(9), generator.randrange(2)
        wrong = [*true[:place], true[place + 1], true[place], *true[place + 2 :]]
        choices = [" ".join(wrong)]
        choices.insert(label, " ".join(true))
        lines.append(json.dumps({"context": " ".join(words[:15]), "choices": choices, "label": label}) + "\n")
    assert len(lines) == NUM_DOCUMENTS
    (folder / "text.jsonl").write_text("".join(lines))
    (folder / "let_continuation.yaml").write_text(TASK.format(file=folder / "text.jsonl"))
    return folder


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'base = "tests.support.demo_teacher"\ndump_folder = "{tmp_path}"\n[runtime]\ndevice = "cpu"\n')
    return file


def test_scores_become_a_row_and_the_model_stays(checkpoint, tasks, config, tmp_path):
    out, export = tmp_path / "rows.jsonl", tmp_path / "exported"
    args = ["eval", checkpoint, "--config", config, "--tasks", "let_continuation", "--include-path", tasks]
    args += ["--out", out, "--export", export, "--max-length", "512", "--training.seq_len", "128"]
    done = jobs.run("let_plugin.bench", *args, HF_DATASETS_CACHE=str(tmp_path / "cache"))

    (row,) = rows.read(out)
    scores = row["results"]["let_continuation"]
    # What comes by chance is 0.5; a model that has learnt the language knows better.
    assert scores["acc"] >= 0.75 and 0 < scores["acc_stderr"] < 0.1
    assert row["values"] == [scores["acc"]]
    assert (row["kind"], row["num_fewshot"], row["max_length"]) == ("eval", 1, 512)
    assert row["checkpoint"] == str(checkpoint) and "seq_len = 128" in row["config"]
    assert f"let_continuation: acc {scores['acc']:.4f}" in done.stdout

    shipped, exported = load_file(f"{TEACHER}/model.safetensors"), load_file(export / "model.safetensors")
    assert shipped.keys() == exported.keys()
    assert all(weight.equal(exported[name]) for name, weight in shipped.items())

    # Bad input is named at the start, and changes nothing.
    wrong = ["eval", checkpoint, "--config", config, "--tasks", "let_continuation", "hellaswagg", "--out", out]
    failed = jobs.run("let_plugin.bench", *wrong, check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "did you mean 'hellaswag'" in failed.stderr and "'let_continuation'" in failed.stderr
    assert rows.read(out) == [row]


def test_data_that_cannot_be_had_are_named(checkpoint, config, tmp_path):
    args = ["eval", checkpoint, "--config", config, "--tasks", "sciq", "--out", tmp_path / "rows.jsonl"]
    failed = jobs.run("let_plugin.bench", *args, check=False, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path))
    assert failed.returncode == 2 and "the data of a task cannot be had" in failed.stderr
    assert not (tmp_path / "rows.jsonl").exists()
