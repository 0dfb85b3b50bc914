"""Local text files as torchtitan's datasets."""

import gzip
import json
import lzma

import datasets
import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from let_plugin.config.errors import ConfigError
from let_plugin.demo import TOKENIZER
from let_plugin.runtime import data

LINES = "".join(json.dumps({"text": text, "title": "not read"}) + "\n" for text in ("one", "zwei"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, name):
    """A file of the kind that its name says, with the texts "one" and "zwei"."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_dict({"text": ["one", "zwei"]}).to_parquet(path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    elif name.endswith(".xz"):
        path.write_bytes(lzma.compress(LINES.encode()))
    elif name.endswith(".txt"):
        path.write_text("one\nzwei\n")
    else:
        path.write_text(LINES)
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


@pytest.mark.parametrize("name", ["", "absent.jsonl", "*.parquet", "empty"])
def test_nothing_there(tmp_path, name):
    write(tmp_path, "a.jsonl")
    (tmp_path / "empty").mkdir()
    path = name and f"{tmp_path}/{name}"
    with pytest.raises(ConfigError, match=r"^a\.key = .*no such file; give a file, a folder or a glob pattern"):
        data.find_text_files(path, key="a.key")


@pytest.mark.parametrize("names", [("a.csv",), ("a.jsonl", "b.txt"), ("a.jsonl", "b.csv"), ("a.xz",)])
def test_files_of_an_unknown_kind_or_of_several(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"dataloader\.dataset_path = .*files of one kind out of \.jsonl, "):
        data.load_text_files(str(tmp_path))


def test_documents_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    with pytest.raises(ConfigError, match=r'dataloader\.dataset_path = .*"text".*content'):
        data.load_text_files(str(tmp_path / "a.jsonl"))


def test_registering_twice_is_safe():
    data.register()
    before = set(DATASETS)
    data.register()
    assert before == set(DATASETS)
    assert {"text_files", "let_demo_train", "let_demo_test", "pile_train", "pile_validation"} <= set(DATASETS)


def batch_of(dataset, path=None):
    data.register()
    config = HuggingFaceTextDataLoader.Config(dataset=dataset, dataset_path=path)
    tokenizer = HuggingFaceTokenizer(tokenizer_path=TOKENIZER)
    loader = config.build(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=16, local_batch_size=1)
    inputs, labels = next(iter(loader))
    return tokenizer, inputs["input"][0].tolist(), labels[0].tolist()


def test_torchtitans_loader_reads_text_files(tmp_path):
    path = write(tmp_path / "text", "a.jsonl")
    tokenizer, tokens, labels = batch_of("text_files", str(path))
    documents = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in ("one", "zwei")] * 4  # again and again
    assert tokens == [token for document in documents for token in document[:-1]][:16]
    assert labels == [token for document in documents for token in document[1:]][:16]


def test_torchtitans_loader_reads_the_demos_text():
    with lzma.open(data.TEXT["validation"], "rt") as file:
        text = json.loads(next(file))["text"]
    tokenizer, tokens, _ = batch_of("let_demo_validation")
    assert tokens == tokenizer.encode(text, add_bos=True, add_eos=True)[:16]
    assert len(text) > 100


def pile(folder):
    """Files as a copy of The Pile has them: two to train on and one for validation."""
    zstandard = pytest.importorskip("zstandard")
    (folder / "train").mkdir(parents=True)
    for name in ("train/00", "train/01", "val", "test"):
        lines = "".join(json.dumps({"text": f"{name} {i}", "meta": {"pile_set_name": "-"}}) + "\n" for i in range(3))
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return str(folder)


def test_the_pile_is_streamed_from_a_local_copy(tmp_path):
    path = pile(tmp_path / "pile")
    data.register()
    training = DATASETS["pile_train"].loader(path)
    assert isinstance(training, datasets.IterableDataset)
    assert [sample["text"] for sample in training] == [f"train/0{file} {i}" for file in range(2) for i in range(3)]
    assert [sample["text"] for sample in DATASETS["pile_validation"].loader(path)] == [f"val {i}" for i in range(3)]
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    tokenizer, tokens, _ = batch_of("pile_validation", path)
    first = tokenizer.encode("val 0", add_bos=True, add_eos=True)[:-1]
    assert tokens[: len(first)] == first


@pytest.mark.parametrize("path", [data.PILE, "empty"])
def test_a_pile_that_cannot_be_read(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    data.register()
    with pytest.raises(ConfigError, match=rf"^dataloader\.dataset_path = '{path}': no val\.jsonl\.zst .*give a folder"):
        DATASETS["pile_validation"].loader(path)
