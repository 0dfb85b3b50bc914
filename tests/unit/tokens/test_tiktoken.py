"""The tokenizer that reads tiktoken rank files, compared with the `tokenizers` library."""

import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from let_plugin.tokens import tiktoken
from let_plugin.tokens.tiktoken import LLAMA3_PATTERN, TikTokenTokenizer
from let_plugin.tokens.token_bytes import token_bytes
from tests.support.problems import problem_of
from tests.support.tokenizer_kinds import EOS, GPT2_PATTERN, demo, rank_lines, write_ranks

TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: EOS not in text)
OPTIONS = {"pattern": GPT2_PATTERN, "special_tokens": {EOS: 0, "<|far|>": 5000}, "eos_token": EOS}
BYTES = {bytes([byte]): byte for byte in range(256)}


def make(folder, **options):
    return TikTokenTokenizer.Config(**{**OPTIONS, **options}).build(tokenizer_path=str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ranks(tmp_path_factory.mktemp("demo")).parent


@pytest.fixture(scope="module")
def tokenizer(folder):
    return make(folder)


@settings(deadline=None)
@given(TEXTS)
def test_the_ids_are_those_of_the_same_tokenizer_json(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == demo().encode(text).ids
    assert tokenizer.decode(ids) == text
    values = token_bytes(tokenizer)
    assert b"".join(values[i] for i in ids) == text.encode()


def test_the_vocabulary_has_gaps_and_begin_and_end(folder, tokenizer):
    assert tokenizer.get_vocab_size() == 5001
    assert tokenizer.get_vocab() == demo().get_vocab() | {"<|far|>": 5000}
    assert [i for i, value in enumerate(token_bytes(tokenizer)) if value is None] == [0, *range(4096, 5001)]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_token) == (None, 0, EOS)
    plain = tokenizer.encode("the end")
    assert tokenizer.encode("the end", add_bos=True, add_eos=True) == [*plain, 0]
    other = make(folder, bos_token="<|far|>")
    assert other.encode("the end", add_bos=True, add_eos=True) == [5000, *plain, 0]


def test_special_tokens_are_text_when_encoded_and_left_out_when_decoded(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b<|far|>")
    assert not {0, 5000} & set(ids) and tokenizer.decode(ids) == f"a{EOS}b<|far|>"
    ids = [*tokenizer.encode("a"), 0, *tokenizer.encode("\u4f60")]
    assert tokenizer.decode(ids) == "a\u4f60"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{EOS}\u4f60"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate


def test_only_long_runs_are_cut(folder, tokenizer):
    """After 25,000 characters, as in Llama-3's own code. tiktoken alone overflows its stack after a million."""
    spaces = f"x{' ' * 1_000_000} y"
    llama3 = make(folder, pattern=LLAMA3_PATTERN)
    assert llama3.decode(llama3.encode(spaces)) == spaces
    long = "the quick brown fox " * 10_000
    assert tokenizer.encode(long) == tokenizer.tokenizer.encode_ordinary(long)
    run = "the" * 20_000  # 60,000 characters
    first, second, third = (run[i : i + 25_000] for i in range(0, len(run), 25_000))
    pieces = ["some words, " + first, second, third + " and " + first, second, third + " more"]
    ids = map(tokenizer.tokenizer.encode_ordinary, pieces)
    assert tokenizer.encode(f"some words, {run} and {run} more") == list(itertools.chain(*ids))


def test_llama3s_file_needs_no_options(tmp_path, monkeypatch):
    """A file of its size stands for the real one, which may not be redistributed."""
    tokens = (bytes(token) for length in (1, 2, 3) for token in itertools.product(range(256), repeat=length))
    ranks = {token: rank for rank, token in enumerate(itertools.islice(tokens, 128_000))}
    path = tmp_path / "tokenizer.model"
    path.write_text(rank_lines(ranks))
    config = TikTokenTokenizer.Config(rank_file="tokenizer.model")
    monkeypatch.setattr(tiktoken, "LLAMA3_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    tokenizer = config.build(tokenizer_path=str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.get_vocab_size()) == (128_000, 128_001, 128_256)
    # As in the tokenizer.json of Meta-Llama-3-8B.
    names = ("end_of_text", "end_header_id", "reserved_special_token_4", "eot_id", "reserved_special_token_250")
    text = "".join(f"<|{name}|>" for name in names)
    assert tokenizer.decode([128_001, *range(128_007, 128_010), 128_255], skip_special_tokens=False) == text
    config.bos_token = ""
    assert config.build(tokenizer_path=str(tmp_path)).bos_id is None


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"pattern": ""}, "pattern", "does not say how text is split"),
        ({"pattern": "gpt2"}, "pattern", "loses text"),
        ({"pattern": "("}, "pattern", "not a regular expression"),
        ({"special_tokens": {}}, "special_tokens", "names none: give a table"),
        ({"special_tokens": {EOS: 5}}, f"special_tokens.{EOS}", "that id is taken by b'%'"),
        ({"special_tokens": {EOS: 0, "<b>": 0}}, "special_tokens.<b>", f"that id is taken by {EOS!r}"),
        ({"special_tokens": {EOS: -1}}, f"special_tokens.{EOS}", "0 or more"),
        ({"special_tokens": {EOS: 0, "the": 5000}}, "special_tokens.the", "there is an ordinary token of that name"),
        ({"eos_token": None}, "eos_token", "missing: which special token ends a document?"),
        ({"eos_token": "<|endoftxt|>"}, "eos_token", f"not a special token; did you mean {EOS!r}?"),
        ({"bos_token": "<s>"}, "bos_token", "not a special token"),
        ({"rank_file": "absent"}, "rank_file", "cannot be read"),
    ],
)
def test_bad_options(folder, options, key, message):
    problem = problem_of(make, folder, **options)
    assert problem.key == f"tokenizer.{key}" and message in problem.message, problem


def test_no_rank_file_and_several(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")  # SentencePiece's
    problem = problem_of(make, tmp_path)
    assert problem.key == "hf_assets_path" and "no tiktoken rank file there" in problem.message
    write_ranks(tmp_path, "a.tiktoken")
    make(tmp_path)
    write_ranks(tmp_path, "tokenizer.model")
    problem = problem_of(make, tmp_path)
    assert problem.key == "tokenizer.rank_file" and "(a.tiktoken, tokenizer.model): name one" in problem.message
    make(tmp_path, rank_file="a.tiktoken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "YWI=\n", "'YWI=' is not \"token in base64, space, rank\""),
        (lambda text: text + "YWI= -1\n", "'YWI= -1' is not"),
        (lambda text: text[:-2], "it has a token or a rank twice"),  # cut off
        (lambda text: "\n".join(text.split("\n")[3:]), "3 of the 256 single bytes are not in it"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = tmp_path / "a.tiktoken"
    path.write_bytes(rank_lines(BYTES).replace("\n", "\r\n\r\n").encode())
    make(tmp_path, special_tokens={EOS: 256})
    path.write_text(change(rank_lines(BYTES)))
    problem = problem_of(make, tmp_path, special_tokens={EOS: 300})
    assert problem.key == "hf_assets_path" and problem.message.startswith(f"not a tiktoken rank file: {message}")
