"""The teacher's tokens that each of the student's is made of: the same bytes, in as few tokens as it has."""

import pytest

from let_plugin.tokens.encoding import teacher_pieces
from let_plugin.tokens.token_bytes import token_bytes
from tests.support.tokenizer_kinds import KINDS


@pytest.mark.parametrize("teacher", ["byte-level", "Llama-2", "Unigram", "tiktoken"])
@pytest.mark.parametrize("student", [*KINDS])
def test_their_bytes_are_the_tokens(student, teacher):
    own, others = KINDS[student](), KINDS[teacher]()
    values, other_values = token_bytes(own), token_bytes(others)
    pieces = teacher_pieces(own, others)
    assert len(pieces) == len(values)
    for token, value in enumerate(values):
        if value is not None:
            assert b"".join(other_values[i] or b"" for i in pieces[token]) == value, value
            assert len(pieces[token]) == 1 or value not in other_values, value
        if student == teacher:  # control tokens too
            assert pieces[token] == [token]
