"""The teacher's tokens of the student's text: causal, monotone, and with equal tokenizers the student's own."""

import pickle
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.demo import TOKENIZER
from let_plugin.teacher.token_alignment import Retokeniser, last_ending_by
from let_plugin.token_bytes import token_bytes
from tests.support import tokenizer_kinds as kinds
from tests.support.tokenizer_kinds import KINDS, MULTILINGUAL, SPACE

LENGTH = 48
# No lone surrogates, which have no bytes; no U+2581, which SentencePiece takes for a space.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), min_size=1)
MIXED = st.lists(st.sampled_from([*MULTILINGUAL, *(t[:200] for t in kinds.documents(20))]) | TEXTS, min_size=2)
PAIRS = [(s, t) for s in KINDS for t in KINDS if s != t]


def retokenise(student, teacher, batch, **options):
    length = batch[0]["input"].shape[1]
    return Retokeniser(student, teacher, **{"teacher_seq_len": 4 * length, **options})(*batch)


@pytest.mark.parametrize(
    ("ends_N", "ends_M", "expected"),
    [
        ([1, 3, 6], [1, 3, 6], [0, 1, 2]),
        ([1, 3, 6], [2, 6], [-1, 0, 1]),
        ([5, 6], [1, 2, 3, 6], [2, 3]),
        ([1, 2], [], [-1, -1]),
        ([2, 2, 3], [2, 2, 4], [1, 1, 1]),
    ],
)
def test_the_last_token_that_ends_by_then(ends_N, ends_M, expected):
    assert last_ending_by(np.array(ends_N), np.array(ends_M)).tolist() == expected


def seen(tokenizer, values, tokens):
    """What a model has read of a text after these tokens; a character of which a part is missing does not count."""
    return b"".join(values[token] or b"" for token in tokens).decode(errors="ignore").lstrip(" ")


@settings(deadline=None, max_examples=60)
@given(pair=st.sampled_from(PAIRS), texts=MIXED, skip=st.integers(0, 200), length=st.integers(1, 60))
def test_no_state_has_seen_text_that_its_token_has_not(pair, texts, skip, length):
    student, teacher = KINDS[pair[0]](), KINDS[pair[1]]()
    tokens, positions, labels = kinds.row(student, texts, length, skip)
    if not tokens:
        return
    (aligned,) = Retokeniser(student, teacher, teacher_seq_len=1).rows(*kinds.batch((tokens, positions, labels)))
    values, teacher_values = token_bytes(student), token_bytes(teacher)
    last = -1
    for i, index in enumerate(aligned.index_L):
        if index < 0:
            continue
        assert index >= last  # monotone
        last = index
        start = i - positions[i]
        first = index - aligned.positions[index]
        own = seen(student, values, tokens[start : i + 1])
        read = seen(teacher, teacher_values, aligned.tokens[first : index + 1])
        if pair[1] == "NFC":
            own = unicodedata.normalize("NFC", own)
        assert own.startswith(read), (own, read)
        if aligned.is_exact_L[i] and start > 0 and pair[1] != "NFC":
            assert own == read
    assert aligned.positions.count(0) == sum(
        any(p == 0 for p in aligned.positions) for p in positions if p == 0
    ) or aligned.positions.count(0) <= positions.count(0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokenizers_give_the_students_own_row(kind):
    tokenizer = KINDS[kind]()

    @settings(deadline=None, max_examples=40)
    @given(texts=MIXED, skip=st.integers(0, 300))
    def check(texts, skip):
        rows = kinds.row(tokenizer, texts, LENGTH, skip)
        if not rows[0]:
            return
        input_dict, labels_BL = kinds.batch(rows)
        length = len(rows[0])
        extras = Retokeniser(tokenizer, tokenizer, teacher_seq_len=length)(input_dict, labels_BL)
        assert extras["teacher_tokens"].tolist() == input_dict["input"].tolist()
        assert extras["teacher_positions"].equal(input_dict["positions"])
        assert extras["teacher_index"].tolist() == [list(range(length))]

    check()
