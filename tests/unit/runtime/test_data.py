"""Local text files as torchtitan's datasets."""

import gzip
import json
import lzma

import datasets
import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from let_plugin.config.errors import ConfigError
from let_plugin.runtime import data

LINES = "".join(json.dumps({"text": text, "title": "not read"}) + "\n" for text in ("one", "zwei"))
CONTENTS = {
    "gz": gzip.compress(LINES.encode()),
    "xz": lzma.compress(LINES.encode()),
    "txt": b"one\nzwei\n",
    "json": LINES.encode(),
    "jsonl": LINES.encode(),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data.register()


def write(folder, name):
    """A file of the kind that its name says, with the texts "one" and "zwei"."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_dict({"text": ["one", "zwei"]}).to_parquet(path)
    else:
        path.write_bytes(CONTENTS[name.rsplit(".", 1)[1]])
    return path


def texts(path):
    return list(data.load_text_files(str(path))["text"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt", "a.jsonl.gz", "a.json.xz"])
def test_every_kind_of_file(tmp_path, name):
    assert texts(write(tmp_path / "text", name)) == ["one", "zwei"]


def test_a_folder_and_a_glob_in_order_of_name(tmp_path):
    folder = tmp_path / "run[1]"  # is not taken for a pattern itself
    for name in ("b.jsonl", "a.jsonl.gz", "c.json"):
        write(folder, name)
    (folder / "subfolder").mkdir()
    names = [path.rsplit("/", 1)[1] for path in data.find_text_files(str(folder), key="k")]
    assert names == ["a.jsonl.gz", "b.jsonl", "c.json"]
    assert texts(folder) == ["one", "zwei"] * 3
    assert texts(folder / "b.jsonl") == ["one", "zwei"]
    assert texts(f"{tmp_path}/run?1?/[ab].*") == ["one", "zwei"] * 2


@pytest.mark.parametrize(
    ("names", "path", "message"),
    [
        (["a.jsonl"], "", "no such file; give a file, a folder or a glob pattern"),
        (["a.jsonl", "b.csv"], "{}", r"files of one kind out of \.jsonl, "),
        (["a.json"], "{}/a.json", 'no field "text", only content'),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, names, path, message):
    for name in names:
        (tmp_path / name).write_text('{"content": "one"}\n')
    with pytest.raises(ConfigError, match=rf"^dataloader\.dataset_path = '.*': .*{message}"):
        data.load_text_files(path.format(tmp_path))


def assert_first_tokens(dataset, path, documents):
    """torchtitan's loader makes its first row of the tokens of these documents."""
    tokenizer = HuggingFaceTokenizer(tokenizer_path=data.TOKENIZER)
    config = HuggingFaceTextDataLoader.Config(dataset=dataset, dataset_path=path)
    loader = config.build(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=16, local_batch_size=1)
    inputs, labels = next(iter(loader))
    encoded = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in documents]
    tokens, next_tokens = ([t for d in encoded for t in d[part]][:16] for part in (slice(-1), slice(1, None)))
    assert inputs["input"][0, : len(tokens)].tolist() == tokens
    assert labels[0, : len(tokens)].tolist() == next_tokens


def test_torchtitans_loader_reads_text_files_and_the_demos_text(tmp_path):
    path = write(tmp_path / "text", "a.jsonl")
    assert_first_tokens("text_files", str(path), ["one", "zwei"] * 4)  # again and again
    with lzma.open(data.TEXT["validation"], "rt") as file:
        assert_first_tokens("let_demo_validation", None, [json.loads(next(file))["text"]])


def test_the_pile_is_streamed_from_a_local_copy(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="pip install let-plugin[pile]")
    (tmp_path / "pile/train").mkdir(parents=True)
    for name in ("train/00", "train/01", "val", "test"):
        lines = "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(3))
        (tmp_path / f"pile/{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    path = str(tmp_path / "pile")
    training = DATASETS["pile_train"].loader(path)
    assert isinstance(training, datasets.IterableDataset)
    assert [sample["text"] for sample in training] == [f"train/0{file} {i}" for file in range(2) for i in range(3)]
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert_first_tokens("pile_validation", path, ["val 0", "val 1", "val 2"])


@pytest.mark.parametrize("path", [data.PILE, "empty"])
def test_a_pile_that_cannot_be_read(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"^dataloader\.dataset_path = '{path}': no val\.jsonl\.zst .*give a folder"):
        DATASETS["pile_validation"].loader(path)
