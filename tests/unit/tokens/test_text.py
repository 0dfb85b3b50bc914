"""Documents, and what a tokenizer makes of them."""

import pytest

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.tokens.text import TextTokenizer, demo_text, read_documents, read_tokenizer

TEXT = "The naïve café: late to early."


def test_a_document_begins_with_the_tokenizers_own_token():
    tokenizer = read_tokenizer(TeacherConfig(path=TEACHER, tokenizer_path=TOKENIZER))
    ids, num_bytes = tokenizer.encode(TEXT, max_tokens=1000)
    assert ids[0] == 0 and 0 not in ids[1:]
    assert num_bytes == len(TEXT.encode())
    assert tokenizer.max_id == 4095


def test_without_one_the_first_token_is_not_predicted():
    with_bos = read_tokenizer(TeacherConfig(tokenizer_path=TOKENIZER))
    tokenizer = TextTokenizer(with_bos._inner, None)
    ids, num_bytes = tokenizer.encode(TEXT, max_tokens=1000)
    assert ids == with_bos.encode(TEXT, max_tokens=1000)[0][1:]
    assert num_bytes == len(TEXT.encode()) - len(tokenizer._inner.decode(ids[:1]).encode())


@pytest.mark.parametrize("bos_id", [0, None])
def test_no_more_than_the_tokens_that_are_left(bos_id):
    inner = read_tokenizer(TeacherConfig(tokenizer_path=TOKENIZER))._inner
    ids, num_bytes = TextTokenizer(inner, bos_id).encode("one two three four five six", max_tokens=3)
    assert len(ids) == 4  # three of them are predicted
    assert num_bytes == len(inner.decode(ids[1:]).encode())


def test_no_tokenizer(tmp_path):
    assert read_tokenizer(TeacherConfig(path=str(tmp_path), spec="smollm2-135m")) is None
    with pytest.raises(ConfigError, match=r"let\.teacher\.tokenizer_path.*no tokenizer\.json"):
        read_tokenizer(TeacherConfig(path=TEACHER, tokenizer_path=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"let\.teacher\.path.*cannot be read"):
        read_tokenizer(TeacherConfig(path=str(tmp_path)))


def test_documents(tmp_path):
    assert len(list(demo_text())) == 300
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    assert list(read_documents(str(tmp_path / "text.txt"))) == ["one\n\ntwo\n"]
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(read_documents(str(tmp_path / "text.jsonl"))) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("absent.txt", None), ("text.doc", b"x"), ("text.txt", b"\xff\xfe"), ("text.jsonl", b'{"title": "x"}\n')],
)
def test_documents_that_cannot_be_read(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as info:
        read_documents(str(tmp_path / name))
    assert [problem.key for problem in info.value.problems] == ["--text"]
