"""The bytes of a text's tokens are the text, whatever the tokenizer."""

import unicodedata

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.demo import TOKENIZER
from let_plugin.tokens.token_bytes import byte_level, leading_space, token_bytes

SPACE = "\u2581"
TRAINING_TEXT = ["the quick brown fox jumps over the lazy dog", "na\u00efve caf\u00e9, \u4f60\u597d  two spaces"] * 9
# No lone surrogates, which have no bytes; no special tokens.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<" not in text)


def demo():
    return Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")


def byte_vocabulary():
    """ids 0 to 258 of Llama-2: unknown, begin and end, and the bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {token: i for i, token in enumerate(tokens)}


def llama2():
    """Llama-2's: BPE with byte fallback, a normaliser that prepends a space."""
    vocabulary = byte_vocabulary()
    for token in (SPACE, "t", "h", "e", f"{SPACE}t", "he", f"{SPACE}the", "\u4f60", SPACE * 2):
        vocabulary[token] = len(vocabulary)
    merges = [(SPACE, "t"), ("h", "e"), (f"{SPACE}t", "he"), (SPACE, SPACE)]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace(prepend_scheme="always"):
    """A Unigram vocabulary with bytes, as SentencePiece makes it."""
    pieces = [(token, 0.0 if i < 3 else -20.0) for token, i in byte_vocabulary().items()]
    pieces += [(SPACE, -3.0), (f"{SPACE}the", -4.0), ("e", -5.0), ("qu", -6.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def encoding():
    ranks = {value: i for i, value in enumerate(token_bytes(demo())) if value is not None}
    special = {"<|endoftext|>": 0, "<|far|>": 5000}
    return tiktoken.Encoding("demo", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens=special)


def joined(tokenizer, text):
    values = token_bytes(tokenizer)
    ids = tokenizer.encode(text, disallowed_special=()) if isinstance(tokenizer, tiktoken.Encoding) else None
    ids = tokenizer.encode(text, add_special_tokens=False).ids if ids is None else ids
    return b"".join(values[i] for i in ids)


def test_the_alphabet_of_byte_level_bpe_is_that_of_the_library():
    assert set(byte_level(bytes(range(256)))) == set(pre_tokenizers.ByteLevel.alphabet())
    text = bytes(range(1, 128)).decode() + "\u00e9\u4f60\U0001f600"
    ((whole, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert byte_level(text.encode()) == whole


@settings(deadline=None)
@given(TEXTS)
def test_byte_level_bpe(text):
    assert joined(demo(), text) == text.encode()


@settings(deadline=None)
@given(TEXTS)
def test_tiktoken(text):
    assert joined(encoding(), text) == text.encode()


@settings(deadline=None)
@given(TEXTS)
def test_sentencepiece(text):
    text = text.replace(SPACE, "")
    assert joined(llama2(), text) == (b" " if text else b"") + text.encode()
    assert joined(metaspace("never"), text) == text.encode()
    added = b"" if not text or text[0] == " " else b" "
    assert joined(metaspace(), text) == added + text.encode()


def test_leading_space():
    tokenizers = {"demo": demo(), "encoding": encoding(), "llama2": llama2(), "metaspace": metaspace()}
    spaces = {name: leading_space(tokenizer) for name, tokenizer in tokenizers.items()}
    assert spaces == {"demo": b"", "encoding": b"", "llama2": b" ", "metaspace": b" "}
    assert leading_space(metaspace("never")) == b""


def test_special_tokens_and_gaps_have_no_bytes():
    assert token_bytes(demo())[0] is None and None not in token_bytes(demo())[1:]
    values = token_bytes(encoding())
    assert len(values) == 5001 and [i for i, value in enumerate(values) if value is None] == [0, *range(4096, 5001)]
    assert token_bytes(llama2())[:5] == [None, None, None, b"\x00", b"\x01"]
    assert token_bytes(metaspace())[:5] == [None, None, None, b"\x00", b"\x01"]


def test_a_piece_that_stands_for_itself():
    values = token_bytes(llama2())
    assert values[-4:] == [b"he", b" the", "\u4f60".encode(), b"  "]


@pytest.mark.parametrize("make", [demo, llama2])
def test_an_added_token_that_is_not_special_stands_for_its_text(make):
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("  \u4f60<tool>", normalized=False)])
    tokenizer.add_special_tokens(["<|im_start|>"])
    values = token_bytes(tokenizer)
    assert values[-2:] == ["  \u4f60<tool>".encode(), None]
    assert joined(tokenizer, "a  \u4f60<tool>").endswith(b"a  \xe4\xbd\xa0<tool>")


def test_normalised_text():
    tokenizer = demo()
    tokenizer.normalizer = normalizers.NFC()
    assert joined(tokenizer, "cafe\u0301") == unicodedata.normalize("NFC", "cafe\u0301").encode()


def test_torchtitans_wrapper():
    assert token_bytes(HuggingFaceTokenizer(tokenizer_path=TOKENIZER)) == token_bytes(demo())


def test_a_fast_tokenizer_of_transformers():
    transformers = pytest.importorskip("transformers")
    assert token_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=demo())) == token_bytes(demo())


def word_piece():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def characters():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(TRAINING_TEXT, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return tokenizer


@pytest.mark.parametrize(
    ("make", "name"),
    [(word_piece, "WordPiece"), (characters, "BPE"), (lambda: Tokenizer(models.WordLevel({"a": 0})), "WordLevel")],
)
def test_refused(make, name):
    with pytest.raises(ValueError, match=rf"\({name}\) do not say which bytes"):
        token_bytes(make())


def test_an_unknown_kind_of_tokenizer():
    with pytest.raises(ValueError, match="of a dict"):
        token_bytes({})
