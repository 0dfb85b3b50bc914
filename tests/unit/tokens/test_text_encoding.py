"""Text in a teacher's tokens, with the ends of their bytes."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from let_plugin.tokens.encoding import TextEncoder, Tokens, match_bytes, teacher_pieces
from let_plugin.tokens.token_bytes import token_bytes
from tests.support import tokenizer_kinds as kinds

# No lone surrogates, which have no bytes; no U+2581, which SentencePiece takes for a space; no special tokens.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=f"<{kinds.SPACE}"), min_size=1)
TEXTS |= st.sampled_from([text.replace("<", "") for text in kinds.MULTILINGUAL])


def encode(encoder, text, *, at_start=False):
    """(bytes of text that the tokenizer has read by then) after each of its tokens."""
    ids, ends = encoder(text, at_start=at_start)
    assert len(ids) == len(ends)
    return ids, [text.encode()[:end] for end in ends]


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("at_start", [False, True])
def test_the_bytes_of_the_tokens_are_the_text_and_end_where_it_is_said(kind, at_start):
    tokenizer = kinds.KINDS[kind]()
    tokens = Tokens(tokenizer)
    encoder = TextEncoder(tokenizer, tokens)
    puts_space = at_start and kind in ("Llama-2", "Unigram", "Metaspace first")

    @settings(deadline=None, max_examples=25)
    @given(TEXTS)
    def check(text):
        ids, read = encode(encoder, text, at_start=at_start)
        assert read[-1] == text.encode()
        whole = " " * (puts_space and (kind == "Llama-2" or text[0] != " ")) + text
        whole = kinds.NFC.normalize_str(text) if kind == "NFC" else whole
        so_far = list(accumulate(tokens.bytes[token] for token in ids))
        assert so_far[-1].decode() == whole
        if kind != "NFC":
            space = b" " * (len(whole) - len(text))
            assert [ours.removeprefix(space) for ours in so_far] == read

    check()


def test_a_token_of_a_character_that_a_normalizer_has_composed_has_read_all_of_its_parts():
    tokenizer = kinds.KINDS["NFC"]()
    *composed, last = encode(TextEncoder(tokenizer, Tokens(tokenizer)), "e\u0301!")[1]
    assert set(composed) == {"e\u0301".encode()} and last == "e\u0301!".encode()


def test_tokens_of_the_same_bytes():
    assert match_bytes([None, b"a", b"b", b"c"], [b"b", b"a", None, b"b"]).tolist() == [-1, 1, 3, -1]


@pytest.mark.parametrize("teacher", ["byte-level", "Llama-2", "Unigram", "tiktoken"])
@pytest.mark.parametrize("student", kinds.KINDS)
def test_the_teachers_tokens_of_a_token_have_its_bytes_and_are_as_few_as_it_has(student, teacher):
    own, others = kinds.KINDS[student](), kinds.KINDS[teacher]()
    values, other_values = token_bytes(own), token_bytes(others)
    pieces = teacher_pieces(own, others)
    assert len(pieces) == len(values)
    for token, value in enumerate(values):
        if value is not None:
            assert b"".join(other_values[i] or b"" for i in pieces[token]) == value, value
            assert len(pieces[token]) == 1 or value not in other_values, value
        if student == teacher:  # control tokens too
            assert pieces[token] == [token]
