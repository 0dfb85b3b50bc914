"""The bytes of a text's tokens are the text, whatever the tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.demo import TOKENIZER
from let_plugin.tokens.token_bytes import byte_level, token_bytes
from tests.support import tokenizer_kinds as kinds

# No lone surrogates, which have no bytes; no U+2581, which SentencePiece takes for a space; no special tokens.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=f"<{kinds.SPACE}"))


def joined(tokenizer, text):
    values = token_bytes(tokenizer)
    return b"".join(values[i] for i in kinds.ids_of(tokenizer, text)).decode()


def test_the_alphabet_of_byte_level_bpe_is_that_of_the_library():
    assert set(byte_level(bytes(range(256)))) == set(pre_tokenizers.ByteLevel.alphabet())
    text = bytes(range(1, 128)).decode() + "\u00e9\u4f60\U0001f600"
    ((whole, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert byte_level(text.encode()) == whole


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_bytes_of_a_texts_tokens_are_the_text(kind):
    tokenizer = kinds.KINDS[kind]()

    @settings(deadline=None, max_examples=40)
    @given(TEXTS)
    def check(text):
        expected = kinds.NFC.normalize_str(text) if kind == "NFC" else text
        if text and (kind == "Llama-2" or (kind in ("Unigram", "Metaspace first") and text[0] != " ")):
            expected = f" {text}"
        assert joined(tokenizer, text) == expected

    check()


@pytest.mark.parametrize("make", [kinds.demo, kinds.llama2, kinds.metaspace])
def test_special_tokens_have_no_bytes_and_other_added_ones_stand_for_their_text(make):
    tokenizer = Tokenizer.from_str(make().to_str())
    known = token_bytes(tokenizer)
    assert [i for i, value in enumerate(known) if value is None] == ([0] if make is kinds.demo else [0, 1, 2])
    tokenizer.add_tokens([AddedToken("  \u4f60<tool>", normalized=False)])
    tokenizer.add_special_tokens(["<|im_start|>"])
    assert token_bytes(tokenizer) == [*known, "  \u4f60<tool>".encode(), None]
    assert joined(tokenizer, "a  \u4f60<tool>").endswith("a  \u4f60<tool>")


def test_tokenizers_of_torchtitan_and_transformers():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=kinds.demo())
    for tokenizer in (fast, HuggingFaceTokenizer(tokenizer_path=TOKENIZER)):
        assert token_bytes(tokenizer) == token_bytes(kinds.demo())


def test_tokens_that_do_not_say_their_bytes_are_refused():
    word_piece = models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")
    for model in (word_piece, models.BPE({"a": 0, "b": 1}, []), models.WordLevel({"a": 0})):
        with pytest.raises(ValueError, match=rf"\({type(model).__name__}\) do not say which bytes"):
            token_bytes(Tokenizer(model))
    with pytest.raises(ValueError, match="of a dict"):
        token_bytes({})
