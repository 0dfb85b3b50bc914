"""The teacher's tokens of the student's text: causal, monotone, and with equal tokenizers the student's own."""

import functools
import pickle
import unicodedata

import pytest
import tiktoken
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from let_plugin.tokens.alignment import Retokenizer
from let_plugin.tokens.token_bytes import token_bytes
from tests.support import tokenizer_kinds as kinds
from tests.support.tokenizer_kinds import KINDS, MULTILINGUAL, SPACE

LENGTH = 48
# No lone surrogates, which have no bytes; no U+2581, which SentencePiece takes for a space.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), min_size=1)
MIXED = st.lists(st.sampled_from([*MULTILINGUAL, *(t[:200] for t in kinds.documents(20))]) | TEXTS, min_size=2)
PAIRS = [(s, t) for s in KINDS for t in KINDS if s != t]


def retokenize(student, teacher, batch, **options):
    length = batch[0]["input"].shape[1]
    return Retokenizer(student, teacher, **{"teacher_seq_len": 4 * length, **options})(*batch)


def seen(values, tokens, without=()):
    """What a model has read of a text after these tokens; a character of which a part is missing does not count."""
    text = b"".join(values[token] or b"" for token in tokens).decode(errors="ignore")
    for special in without:
        text = text.replace(special, "")
    return text.lstrip(" ")


@functools.cache
def of_pair(student, teacher):
    """What retokenizes, the bytes of both, and text that the teacher takes for a token which stands for no text."""
    student, teacher = KINDS[student](), KINDS[teacher]()
    added = teacher.get_added_tokens_decoder().values() if isinstance(teacher, Tokenizer) else ()
    retokenize = Retokenizer(student, teacher, teacher_seq_len=1)
    return retokenize, token_bytes(student), token_bytes(teacher), [token.content for token in added]


@settings(deadline=None, max_examples=60)
@given(pair=st.sampled_from(PAIRS), texts=MIXED, skip=st.integers(0, 200), length=st.integers(1, 60))
@example(pair=("demo", "Unigram"), texts=["No more.", "It was <s>struck</s> out, and it ends here."], skip=0, length=60)
@example(pair=("byte-level", "Llama-2"), texts=[MULTILINGUAL[0], MULTILINGUAL[7]], skip=29, length=60)
@example(pair=("demo", "NFC"), texts=["x", " e\u0301 a"], skip=0, length=9)
def test_no_state_has_seen_text_that_its_token_has_not(pair, texts, skip, length):
    tokens, positions, labels = kinds.row(KINDS[pair[0]](), texts, length, skip)
    assume(tokens)
    retokenize, values, teacher_values, special = of_pair(*pair)
    (aligned,) = retokenize.rows(*kinds.batch((tokens, positions, labels)))
    last = -1
    for i, index in enumerate(aligned.index_L):
        if index < 0:
            continue
        assert index >= last  # monotone
        last = index
        own = [seen(values, tokens[i - positions[i] : i + 1], without) for without in ((), special)]
        read = seen(teacher_values, aligned.tokens[index - aligned.positions[index] : index + 1])
        if pair[1] == "NFC":
            own = [unicodedata.normalize("NFC", text) for text in own]
        assert any(text.startswith(read) for text in own)


SMOLLM2 = pytest.param(
    "smollm2", marks=pytest.mark.skipif(not kinds.SMOLLM2.is_dir(), reason="make fetch-smollm2"), id="SmolLM2"
)


@pytest.mark.parametrize("kind", [*KINDS, SMOLLM2])
def test_equal_tokenizers_give_the_students_own_row(kind):
    """Wherever it is cut: in words, runs of spaces and digits, and characters."""
    tokenizer = KINDS[kind]() if kind in KINDS else Tokenizer.from_file(str(kinds.SMOLLM2 / "tokenizer.json"))
    retokenize = Retokenizer(tokenizer, tokenizer, teacher_seq_len=LENGTH)

    @settings(deadline=None, max_examples=25)
    @given(texts=MIXED, skip=st.integers(0, 300))
    def check(texts, skip):
        tokens, positions, labels = kinds.row(tokenizer, texts, LENGTH, skip)
        assume(tokens)
        extras = retokenize(*kinds.batch((tokens, positions, labels)))
        length = len(tokens)
        assert extras["teacher_tokens"][0, :length].tolist() == tokens
        assert extras["teacher_positions"][0, :length].tolist() == positions
        assert extras["teacher_index"].tolist() == [list(range(length))]

    check()


def small(*merged, special=()):
    """A tokenizer of single bytes and of these words."""
    values = [bytes([i]) for i in range(256)]
    # What tiktoken merges has to be reached pair by pair.
    values += sorted({word[:n].encode() for word in merged for n in range(2, len(word) + 1)})
    ranks = {value: i for i, value in enumerate(values)}
    special = {name: len(values) + i for i, name in enumerate(special)}
    return tiktoken.Encoding("small", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens=special)


class Roles:
    """A tokenizer that names begin and end of a document, as torchtitan's do."""

    def __init__(self, tokenizer, bos=None, eos=None):
        self.tokenizer = tokenizer
        self.bos_id = bos and tokenizer.encode_single_token(bos)
        self.eos_id = eos and tokenizer.encode_single_token(eos)


def of(tokenizer, text):
    return tokenizer.encode(text, allowed_special="all")


def documents(tokenizer, *texts):
    """A row of these documents; a word may go on behind it."""
    tokens = [of(tokenizer, text) for text in texts]
    positions = [p for document in tokens for p in range(len(document))]
    return kinds.batch(([token for document in tokens for token in document], positions, [-1] * len(positions)))


def test_by_hand():
    student, teacher = small("the", " cat"), small("he", " ca")
    batch = documents(student, "x", "the cat sat")
    extras = Retokenizer(student, teacher, teacher_seq_len=14)(*batch)
    expected = of(teacher, "x") + of(teacher, "the cat sat")  # x | t he | _ca t | _ s a t
    assert extras["teacher_tokens"].tolist() == [expected + [0] * (14 - len(expected))]
    assert extras["teacher_positions"].tolist() == [[0, *range(len(expected) - 1), *range(14 - len(expected))]]
    # x | the | _cat | _ s a t
    assert [student.decode([i]) for i in batch[0]["input"][0].tolist()] == ["x", "the", " cat", " ", "s", "a", "t"]
    assert extras["teacher_index"].tolist() == [[0, 2, 4, 5, 6, 7, 8]]
    extras = Retokenizer(student, teacher, teacher_seq_len=5)(*batch)  # what does not fit is not aligned
    assert extras["teacher_tokens"].tolist() == [expected[:5]]
    assert extras["teacher_index"].tolist() == [[0, 2, 4, -1, -1, -1, -1]]


def test_a_token_without_a_state_and_tokens_of_another_end():
    student, teacher = small(), small("the", "cat")
    batch = documents(student, "x", "the cat ")
    #                                                              x   t   h  e  _   c   a  t  _
    assert retokenize(student, teacher, batch)["teacher_index"].tolist() == [[0, -1, -1, 1, 2, 2, 2, 3, 4]]
    (row,) = Retokenizer(student, teacher, teacher_seq_len=9).rows(*batch)
    assert row.is_exact_L.tolist() == [True, False, False, True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("special", "roles", "expected"),
    [
        (["<end>", "<begin>"], {}, "<begin>"),  # by its text
        (["</s>", "<s>"], {"bos": "<s>", "eos": "</s>"}, "<s>"),  # by its role
        (["</s>", "<s>"], {"eos": "</s>"}, None),
    ],
)
def test_control_tokens(special, roles, expected):
    student = small("ab", special=["<begin>"])
    teacher = small("ab", special=special)
    batch = documents(student, "<begin>ab", "<begin>ab")
    student_with_roles, teacher_with_roles = Roles(student, bos="<begin>"), Roles(teacher, **roles)
    extras = Retokenizer(student_with_roles, teacher_with_roles, teacher_seq_len=6)(*batch)
    document = [*(of(teacher, expected) if expected else []), *of(teacher, "ab")]
    assert extras["teacher_tokens"].tolist() == [(document * 2 + [0] * 4)[:6]]
    assert extras["teacher_index"].tolist() == [[0, 1, 2, 3] if expected else [-1, 0, -1, 1]]


def test_a_character_that_the_row_cuts():
    """Its tokens are kept if they are the teacher's too, whatever the words around them are encoded as."""
    teacher = kinds.metaspace()
    tokens = [*"\U0001f600 the".encode()[2:], *" the\U0001f600".encode()[:-1]]
    batch = kinds.batch((tokens, list(range(len(tokens))), [-1] * len(tokens)))
    (row,) = Retokenizer(small(), teacher, teacher_seq_len=9).rows(*batch)
    ids = [teacher.token_to_id(token) for token in ("<0x98>", "<0x80>")]
    assert row.tokens[:2] == ids and row.index_L.tolist()[:2] == [0, 1]
    assert teacher.id_to_token(row.tokens[-1]) == "<0x98>" and row.index_L[-1] == len(row.tokens) - 1


def test_without_positions_a_row_is_one_document():
    student = small("ab", special=["<end>"])
    input_dict, labels_BL = documents(student, "ab<end>ab")
    del input_dict["positions"]
    extras = retokenize(student, student, (input_dict, labels_BL), teacher_seq_len=3)
    assert sorted(extras) == ["teacher_index", "teacher_tokens"]
    assert extras["teacher_tokens"].equal(input_dict["input"])


@pytest.mark.parametrize("kind", ["Llama-2", "Unigram", "tiktoken"])
def test_a_copy_in_another_process_does_the_same(kind):
    retokenize = Retokenizer(kinds.demo(), KINDS[kind](), teacher_seq_len=1500)
    batch = kinds.batch(kinds.row(kinds.demo(), [*MULTILINGUAL, *kinds.documents(3)], 600, 3))
    extras, of_copy = retokenize(*batch), pickle.loads(pickle.dumps(retokenize))(*batch)
    assert all(torch.equal(extras[name], of_copy[name]) for name in extras)
    assert (extras["teacher_index"] >= 0).float().mean() > 0.8
