"""Text in a teacher's tokens, with the ends of their bytes."""

import pytest

from let_plugin.tokens.encoding import TextEncoder, Tokens, match_bytes, match_controls
from tests.support import tokenizer_kinds as kinds


def encode(tokenizer, text, *, at_start=False):
    """(bytes of text that the tokenizer has read by then) after each of its tokens."""
    ids, ends = TextEncoder(tokenizer, Tokens(tokenizer))(text, at_start=at_start)
    assert len(ids) == len(ends)
    return ids, [text.encode()[:end] for end in ends]


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("at_start", [False, True])
def test_the_ends_are_those_of_the_tokens_bytes(kind, at_start):
    tokenizer = kinds.KINDS[kind]()
    tokens = Tokens(tokenizer)
    for text in kinds.MULTILINGUAL:
        if "<s>" in text and kind in ("Unigram", "Metaspace first"):
            continue  # a piece of theirs
        ids, read = encode(tokenizer, text, at_start=at_start)
        assert read[-1] == text.encode()
        so_far = b""
        for token, prefix in zip(ids, read, strict=True):
            so_far += tokens.bytes[token]
            if kind != "NFC":
                assert so_far in (prefix, tokens.leading_space.encode() + prefix)


def test_a_token_of_a_character_that_a_normalizer_has_composed_has_read_all_of_its_parts():
    *composed, last = encode(kinds.KINDS["NFC"](), "e\u0301!")[1]
    assert set(composed) == {"e\u0301".encode()} and last == "e\u0301!".encode()


def test_tokens_of_the_same_bytes():
    assert match_bytes([None, b"a", b"b", b"c"], [b"b", b"a", None, b"b"]).tolist() == [-1, 1, 3, -1]
    for make in kinds.KINDS.values():
        tokens = Tokens(make())
        same = match_bytes(tokens.bytes, tokens.bytes)
        assert [i for i in range(len(same)) if same[i] != i] == sorted(tokens.names)
        assert match_controls(tokens, tokens) == {i: i for i in tokens.names}
