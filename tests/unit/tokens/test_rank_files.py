"""tiktoken rank files, read and refused."""

import hashlib
import json

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from let_plugin.config.errors import ConfigError
from let_plugin.tokens import rank_files
from let_plugin.tokens.rank_files import KNOWN, SpecialTokens
from tests.support.rank_files import EOS, demo_ranks, demo_tokenizer, lines_of, write_demo

KEY = "let.teacher.tokenizer_path"
BYTES = {bytes([byte]): byte for byte in range(256)}


def test_a_rank_file_is_read(tmp_path):
    file = rank_files.read(write_demo(tmp_path), key=KEY)
    assert file.ranks == demo_ranks() and len(file.ranks) == 4095
    assert (file.known_as, file.special_tokens()) == ([], None)


def test_its_vocabulary_is_that_of_the_tokenizer_json(tmp_path):
    file = rank_files.read(write_demo(tmp_path), key=KEY)
    assert rank_files.vocabulary(file.ranks, {EOS: 0}) == demo_tokenizer().get_vocab(with_added_tokens=True)


def test_windows_lines_and_empty_ones(tmp_path):
    path = tmp_path / "a.tiktoken"
    path.write_bytes(lines_of(BYTES).replace("\n", "\r\n\r\n").encode())
    assert rank_files.read(path, key=KEY).ranks == BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "YWI=\n", "line 257 is 'YWI=', not \"token in base64, space, rank\""),
        (lambda text: text + "YWI= x\n", "line 257 is 'YWI= x'"),
        (lambda text: text + "YWI= -1\n", "line 257"),
        (lambda text: text + "YWI 256\n", "line 257 is 'YWI 256'"),  # padding is missing
        (lambda text: text + "Y*I= 256\n", "line 257"),
        (lambda text: text[:-2], "lines 26 and 256 have the same rank, 25"),  # cut off
        (lambda text: text + "YWI= 7\n", "lines 8 and 257 have the same rank, 7"),
        (lambda text: text + "YQ== 256\n", "lines 98 and 257 have the same token, b'a'"),
        (lambda text: "\n".join(text.split("\n")[3:]), r"3 of the 256 single bytes are not in it \(0x00 for one\)"),
        (lambda text: "", "256 of the 256 single bytes"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = tmp_path / "a.tiktoken"
    path.write_text(change(lines_of(BYTES)))
    with pytest.raises(ConfigError, match=rf"^{KEY} = '.*a\.tiktoken': not a tiktoken rank file: {message}"):
        rank_files.read(path, key=KEY)


@pytest.mark.parametrize("name", ["absent.tiktoken", "."])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{KEY}.*cannot be read"):
        rank_files.read(tmp_path / name, key=KEY)


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "o200k_base.tiktoken"])
def test_the_only_rank_file_of_a_folder_is_found(tmp_path, name):
    assert rank_files.find(str(tmp_path), key=KEY) is None
    path = write_demo(tmp_path, name)
    write_demo(tmp_path, "other.model")
    assert rank_files.find(str(tmp_path), key=KEY) == path
    assert rank_files.find(str(tmp_path / "absent"), key=KEY) is None


def test_a_model_of_sentencepiece_is_no_rank_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert rank_files.find(str(tmp_path), key=KEY) is None


def test_several_rank_files(tmp_path):
    write_demo(tmp_path, "a.tiktoken")
    write_demo(tmp_path, "tokenizer.model")
    with pytest.raises(ConfigError, match=rf"{KEY}: more than one .*\(a\.tiktoken, tokenizer\.model\): name one"):
        rank_files.find(str(tmp_path), key=KEY)


def test_special_tokens_beside_the_file(tmp_path):
    file = rank_files.read(write_demo(tmp_path, tell_special_tokens=True), key=KEY)
    assert file.special_tokens() == SpecialTokens({EOS: 0}, EOS, EOS)


def test_a_tokenizer_config_that_names_no_special_tokens(tmp_path):
    path = write_demo(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    assert rank_files.read(path, key=KEY).special_tokens() is None


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens_decoder": {"x": {"content": "a"}}}', b"\xff"])
def test_a_tokenizer_config_that_cannot_be_read(tmp_path, content):
    path = write_demo(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: its special tokens cannot be read"):
        rank_files.read(path, key=KEY).special_tokens()


def test_a_known_file_is_told_by_its_content(tmp_path, monkeypatch):
    path = write_demo(tmp_path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    known = rank_files.KnownVocabulary(sha256, 4095, ".", SpecialTokens({EOS: 0}))
    monkeypatch.setitem(KNOWN, "demo", known)
    assert rank_files.read(path, key=KEY).known_as == ["demo"]
    assert rank_files.read(path, key=KEY).special_tokens() == known.special_tokens
    monkeypatch.setitem(KNOWN, "demo2", known)
    assert rank_files.read(path, key=KEY).known_as == ["demo", "demo2"]
    assert rank_files.read(path, key=KEY).special_tokens() is None
    path.write_text(f"{path.read_text()}\n")
    assert rank_files.read(path, key=KEY).known_as == []


OPENAI = ["gpt2", "p50k_base", "cl100k_base", "o200k_base"]


@pytest.fixture
def published(monkeypatch):
    """Name -> what tiktoken says of a vocabulary, and the SHA-256 that it wants of its file; nothing is loaded."""

    def say(name):
        hashes = []

        def load(path, expected_hash):
            hashes.append(expected_hash)
            return {}

        monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load)
        return getattr(openai_public, "r50k_base" if name == "gpt2" else name)(), hashes

    return say


@pytest.mark.parametrize("name", OPENAI)
def test_the_vocabularies_of_openai_are_as_tiktoken_says(published, name):
    theirs, hashes = published(name)
    known = KNOWN[name]
    assert hashes == [known.sha256]
    assert known.special_tokens.ids == theirs["special_tokens"]
    assert (known.special_tokens.bos_token, known.special_tokens.eos_token) == (None, EOS)
    if "explicit_n_vocab" in theirs:
        assert known.num_ranks + len(known.special_tokens.ids) == theirs["explicit_n_vocab"]

    ours, own = (
        tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=demo_ranks(), special_tokens={})
        for pattern in (known.pattern, theirs["pat_str"])
    )

    @given(st.text())
    def split_alike(text):
        assert ours.encode_ordinary(text) == own.encode_ordinary(text)

    split_alike()


def test_llama3s_special_tokens():
    """As in the tokenizer.json of Meta-Llama-3-8B and of Llama-3.1-8B."""
    old, new = (KNOWN[name].special_tokens for name in ("llama3", "llama3.1"))
    for special in (old, new):
        assert list(special.ids.values()) == list(range(128000, 128256))
        assert [special.ids[token] for token in (special.bos_token, special.eos_token)] == [128000, 128001]
        assert special.ids["<|eot_id|>"] == 128009 and special.ids["<|end_header_id|>"] == 128007
    assert old.ids["<|reserved_special_token_4|>"] == 128008 and old.ids["<|reserved_special_token_250|>"] == 128255
    wanted = {"<|finetune_right_pad_id|>": 128004, "<|eom_id|>": 128008, "<|python_tag|>": 128010}
    wanted |= {"<|reserved_special_token_2|>": 128005, "<|reserved_special_token_247|>": 128255}
    assert {token: new.ids[token] for token in wanted} == wanted
