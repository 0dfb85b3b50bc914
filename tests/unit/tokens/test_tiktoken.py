"""The tokenizer that reads Llama-3's rank file, compared with the `tokenizers` library.

The demo's vocabulary stands for Llama-3's, which may not be redistributed: with Llama-3's special tokens and pattern.
"""

import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from let_plugin.tokens import tiktoken
from let_plugin.tokens.tiktoken import LLAMA3_PATTERN, TikTokenTokenizer
from let_plugin.tokens.token_bytes import token_bytes
from tests.support.problems import problem_of
from tests.support.tokenizer_kinds import EOS, demo, write_ranks

TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: EOS not in text)
BEGIN, END = 128_000, 128_001


def build(folder):
    return TikTokenTokenizer.Config().build(tokenizer_path=str(folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write_ranks(tmp_path_factory.mktemp("demo"), "tokenizer.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "LLAMA3_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return build(path.parent)


@pytest.fixture(scope="module")
def same():
    """The same tokenizer as tokenizer.json has it."""
    tokenizer = type(demo()).from_str(demo().to_str())
    pieces = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, alphabet])
    return tokenizer


@settings(deadline=None)
@given(TEXTS)
def test_the_ids_are_those_of_the_same_tokenizer_json(tokenizer, same, text):
    ids = tokenizer.encode(text)
    assert ids == same.encode(text).ids
    assert tokenizer.decode(ids) == text
    values = token_bytes(tokenizer)
    assert b"".join(values[i] for i in ids) == text.encode()


def test_the_vocabulary_and_its_special_tokens(tokenizer):
    assert tokenizer.get_vocab_size() == 128_256
    assert tokenizer.get_vocab().items() > {t: i for t, i in demo().get_vocab().items() if t != EOS}.items()
    plain = tokenizer.encode("the end")
    assert tokenizer.encode("the end", add_bos=True, add_eos=True) == [BEGIN, *plain, END]
    # As in the tokenizer.json of Meta-Llama-3-8B.
    names = ("end_of_text", "end_header_id", "reserved_special_token_4", "eot_id", "reserved_special_token_250")
    text = "".join(f"<|{name}|>" for name in names)
    assert tokenizer.decode([END, *range(128_007, 128_010), 128_255], skip_special_tokens=False) == text


def test_special_tokens_are_text_when_encoded_and_left_out_when_decoded(tokenizer):
    ids = tokenizer.encode("a<|end_of_text|>b")
    assert END not in ids and tokenizer.decode(ids) == "a<|end_of_text|>b"
    ids = [*tokenizer.encode("a"), END, *tokenizer.encode("\u4f60")]
    assert tokenizer.decode(ids) == "a\u4f60"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|end_of_text|>\u4f60"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate


def test_only_long_runs_are_cut(tokenizer):
    """After 25,000 characters, as in Llama-3's own code. tiktoken alone overflows its stack after a million."""
    spaces = f"x{' ' * 1_000_000} y"
    assert tokenizer.decode(tokenizer.encode(spaces)) == spaces
    long = "the quick brown fox " * 10_000
    assert tokenizer.encode(long) == tokenizer.tokenizer.encode_ordinary(long)
    run = "the" * 20_000  # 60,000 characters
    first, second, third = (run[i : i + 25_000] for i in range(0, len(run), 25_000))
    pieces = ["some words, " + first, second, third + " and " + first, second, third + " more"]
    ids = map(tokenizer.tokenizer.encode_ordinary, pieces)
    assert tokenizer.encode(f"some words, {run} and {run} more") == list(itertools.chain(*ids))


def test_another_file_is_refused(tmp_path):
    write_ranks(tmp_path, "tokenizer.model")
    problem = problem_of(build, tmp_path)
    assert problem.key == "hf_assets_path" and "convert others to a tokenizer.json" in problem.message
