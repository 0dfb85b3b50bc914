"""The bytes of a text's tokens are the text, whatever the tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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


def test_special_tokens_have_no_bytes():
    assert token_bytes(kinds.demo())[0] is None and None not in token_bytes(kinds.demo())[1:]
    for tokenizer in (kinds.llama2(), kinds.metaspace()):
        assert token_bytes(tokenizer)[:5] == [None, None, None, b"\x00", b"\x01"]
    assert token_bytes(kinds.llama2())[-2:] == [b"  ", b"    "]


@pytest.mark.parametrize("make", [kinds.demo, lambda: Tokenizer.from_str(kinds.llama2().to_str())])
def test_an_added_token_that_is_not_special_stands_for_its_text(make):
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("  \u4f60<tool>", normalized=False)])
    tokenizer.add_special_tokens(["<|im_start|>"])
    assert token_bytes(tokenizer)[-2:] == ["  \u4f60<tool>".encode(), None]
    assert joined(tokenizer, "a  \u4f60<tool>").endswith("a  \u4f60<tool>")


def test_tokenizers_of_torchtitan_and_transformers():
    assert token_bytes(HuggingFaceTokenizer(tokenizer_path=TOKENIZER)) == token_bytes(kinds.demo())
    transformers = pytest.importorskip("transformers")
    assert token_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=kinds.demo())) == token_bytes(kinds.demo())


def test_tokens_that_do_not_say_their_bytes_are_refused():
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    characters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    words = Tokenizer(models.WordLevel({"a": 0}))
    for tokenizer, name in ((word_piece, "WordPiece"), (characters, "BPE"), (words, "WordLevel")):
        with pytest.raises(ValueError, match=rf"\({name}\) do not say which bytes"):
            token_bytes(tokenizer)
    with pytest.raises(ValueError, match="of a dict"):
        token_bytes({})
