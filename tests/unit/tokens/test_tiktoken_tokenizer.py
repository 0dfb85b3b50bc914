"""The tokenizer that reads tiktoken rank files, compared with the `tokenizers` library."""

import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from let_plugin.config.errors import ConfigError
from let_plugin.tokens.rank_files import KNOWN, KnownVocabulary, SpecialTokens
from let_plugin.tokens.tiktoken import TikTokenTokenizer
from let_plugin.tokens.token_bytes import token_bytes
from tests.support.rank_files import EOS, demo_tokenizer, lines_of, write_demo

TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: EOS not in text)
OPTIONS = {"pattern": "gpt2", "special_tokens": {EOS: 0, "<|far|>": 5000}, "eos_token": EOS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return str(folder)


def make(folder, **options):
    return TikTokenTokenizer.Config(**{**OPTIONS, **options}).build(tokenizer_path=str(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return make(folder)


@settings(deadline=None)
@given(TEXTS)
def test_the_ids_are_those_of_the_same_tokenizer_json(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == demo_tokenizer().encode(text).ids
    assert tokenizer.decode(ids) == text
    values = token_bytes(tokenizer)
    assert b"".join(values[i] for i in ids) == text.encode()


def test_begin_and_end(folder, tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_token) == (None, 0, EOS)
    plain = tokenizer.encode("the end")
    assert tokenizer.encode("the end", add_bos=True, add_eos=True) == [*plain, 0]
    assert tokenizer.encode("", add_bos=True, add_eos=True) == [0] and tokenizer.encode("") == []
    other = make(folder, bos_token="<|far|>")
    assert other.encode("the end", add_bos=True, add_eos=True) == [5000, *plain, 0]
    assert other.encode(text="the end") == plain


def test_what_looks_like_a_special_token_is_text(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b<|far|>")
    assert not {0, 5000} & set(ids) and tokenizer.decode(ids) == f"a{EOS}b<|far|>"


def test_decoding_special_tokens_and_parts_of_characters(tokenizer):
    ids = [*tokenizer.encode("a"), 0, *tokenizer.encode("\u4f60")]
    assert tokenizer.decode(ids) == "a\u4f60"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{EOS}\u4f60"
    assert tokenizer.decode(tokenizer.encode("\u4f60")[:1]) == "\ufffd"
    with pytest.raises(KeyError):
        tokenizer.decode([4999])


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", "cl100k_base", "o200k_base"])
@pytest.mark.parametrize("text", [" ", "a", "^", "\n", "\u4f60", "\u00a0"])
def test_long_runs(folder, pattern, text):
    """tiktoken alone overflows its stack, with Llama-3's pattern and a million spaces."""
    tokenizer = make(folder, pattern=pattern)
    for length in (24_999, 25_000, 25_001, 1_000_000):
        assert tokenizer.decode(tokenizer.encode(f"x{text * length} y")) == f"x{text * length} y"


def test_only_long_runs_are_cut(tokenizer):
    """... after 25,000 characters, as in Llama-3's own code."""
    long = "the quick brown fox " * 10_000
    assert tokenizer.encode(long) == tokenizer.tokenizer.encode_ordinary(long)
    run = "the" * 20_000  # 60,000 characters
    pieces = [run[i : i + 25_000] for i in range(0, len(run), 25_000)]
    words = ["some words, ", *pieces, " and ", *pieces, " more"]
    pieces = ["some words, " + pieces[0], pieces[1], pieces[2] + " and " + pieces[0], pieces[1], pieces[2] + " more"]
    ids = [tokenizer.tokenizer.encode_ordinary(piece) for piece in pieces]
    assert tokenizer.encode("".join(words)) == list(itertools.chain(*ids))


def test_the_size_and_the_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == tokenizer.vocab_size == 5001
    assert tokenizer.get_vocab() == demo_tokenizer().get_vocab() | {"<|far|>": 5000}


def test_special_tokens_from_a_tokenizer_config(tmp_path):
    write_demo(tmp_path, tell_special_tokens=True)
    tokenizer = TikTokenTokenizer.Config(pattern="gpt2").build(tokenizer_path=str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 0, 4096)
    none = TikTokenTokenizer.Config(pattern="gpt2", bos_token="").build(tokenizer_path=str(tmp_path))
    assert (none.bos_id, none.eos_id) == (None, 0)


def many_ranks(number):
    tokens = (bytes(token) for length in (1, 2, 3) for token in itertools.product(range(256), repeat=length))
    return {token: rank for rank, token in enumerate(itertools.islice(tokens, number))}


def test_a_vocabulary_by_name(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_text(lines_of(many_ranks(128000)))
    config = TikTokenTokenizer.Config(vocabulary="llama3.1", rank_file="original/tokenizer.model")
    tokenizer = config.build(tokenizer_path=str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128001, 128256)
    assert tokenizer.decode([128001], skip_special_tokens=False) == "<|end_of_text|>"


def problem_of(folder, **options):
    with pytest.raises(ConfigError) as error:
        TikTokenTokenizer.Config(**options).build(tokenizer_path=str(folder))
    (problem,) = error.value.problems
    return problem


def test_a_known_file_needs_no_option_unless_its_special_tokens_are_in_doubt(tmp_path, monkeypatch):
    path = write_demo(tmp_path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    special = SpecialTokens({EOS: 0}, None, EOS)
    monkeypatch.setitem(KNOWN, "demo", KnownVocabulary(sha256, 4095, KNOWN["gpt2"].pattern, special))
    tokenizer = TikTokenTokenizer.Config().build(tokenizer_path=str(tmp_path))
    assert tokenizer.encode("the end", add_eos=True) == [*demo_tokenizer().encode("the end").ids, 0]

    monkeypatch.setitem(KNOWN, "demo2", KNOWN["demo"])
    problem = problem_of(tmp_path)
    assert problem.key == "tokenizer.vocabulary" and "name one of demo, demo2" in problem.message
    TikTokenTokenizer.Config(vocabulary="demo2").build(tokenizer_path=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"pattern": ""}, "pattern", "does not say how text is split"),
        ({"pattern": "gpt3"}, "pattern", "no vocabulary of that name; did you mean 'gpt2'?"),
        ({"pattern": "("}, "pattern", "not a regular expression"),
        ({"pattern": r"\w+"}, "pattern", "loses text"),
        ({"vocabulary": "cl100k"}, "vocabulary", "unknown; did you mean 'cl100k_base'?"),
        ({"vocabulary": "llama3"}, "vocabulary", "has 128,000 tokens in its file"),
        ({"special_tokens": {}}, "special_tokens", "names none: give a table"),
        ({"special_tokens": {EOS: 5}}, f"special_tokens.{EOS}", "that id is taken by b'%'"),
        ({"special_tokens": {EOS: 0, "<b>": 0}}, "special_tokens.<b>", f"that id is taken by {EOS!r}"),
        ({"special_tokens": {EOS: -1}}, f"special_tokens.{EOS}", "0 or more"),
        ({"special_tokens": {EOS: 0, "the": 5000}}, "special_tokens.the", "there is an ordinary token of that name"),
        ({"special_tokens": {EOS: 0, "": 5000}}, "special_tokens.", "there is an ordinary token of that name"),
        ({"eos_token": None}, "eos_token", "missing: which of the special tokens ends a document? did you mean"),
        ({"eos_token": ""}, "eos_token", "missing"),
        ({"eos_token": "<|endoftxt|>"}, "eos_token", f"not a special token; did you mean {EOS!r}?"),
        ({"bos_token": "<s>"}, "bos_token", "not a special token"),
        ({"rank_file": "absent"}, "rank_file", "cannot be read"),
    ],
)
def test_bad_options(folder, options, key, message):
    problem = problem_of(folder, **{**OPTIONS, "special_tokens": {EOS: 0}, **options})
    assert problem.key == f"tokenizer.{key}" and message in problem.message, problem


def test_no_rank_file_several_and_a_damaged_one(tmp_path):
    problem = problem_of(tmp_path)
    assert problem.key == "hf_assets_path" and "no tiktoken rank file there" in problem.message
    write_demo(tmp_path, "a.tiktoken")
    (tmp_path / "b.tiktoken").write_text("hello\n")
    problem = problem_of(tmp_path)
    assert problem.key == "tokenizer.rank_file" and "(a.tiktoken, b.tiktoken): name one" in problem.message
    make(tmp_path, rank_file="a.tiktoken")
    problem = problem_of(tmp_path, rank_file="b.tiktoken")
    assert problem.key == "tokenizer.rank_file" and "line 1 is 'hello'" in problem.message
