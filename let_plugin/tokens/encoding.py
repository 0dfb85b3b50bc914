"""What two tokenizers need of each other: their tokens' bytes and roles, and text encoded with known ends.

Shape legend: M tokens of a text.
"""

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from tiktoken import Encoding
from tokenizers import Tokenizer

from let_plugin.tokens.token_bytes import parts, token_bytes, unwrapped

# Components of a tokenizer that put a space in front of a text -> what keeps them from it.
_WITHOUT_SPACE: dict[str, dict[str, Any]] = {
    "Prepend": {"prepend": ""},
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


class Tokens:
    """What is known of a tokenizer's tokens.

    `names`: control token -> its text. `bos`, `eos`: begin and end of a document; None: the tokenizer does not say.
    `leading_space`: what the tokenizer puts in front of a text that begins with a letter: a space or nothing. (In front
    of a space, SentencePiece's Metaspace puts nothing, its Prepend, as Llama-2's, a second one.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.bytes = token_bytes(tokenizer)  # by id; None: a control token, which takes a place of its own
        self.lengths = np.array([1 if value is None else len(value) for value in self.bytes], dtype=np.int64)
        inner = unwrapped(tokenizer)
        if isinstance(inner, Encoding):
            self.leading_space = ""
            self.names = {inner.encode_single_token(name): name for name in inner.special_tokens_set}
        else:
            letter = inner.encode("a", add_special_tokens=False).ids
            self.leading_space = b"".join(self.bytes[i] or b"" for i in letter).decode().removesuffix("a")
            self.names = {i: inner.id_to_token(i) or "" for i, value in enumerate(self.bytes) if value is None}
        self.bos = role_id(tokenizer, "bos")
        self.eos = role_id(tokenizer, "eos")

    def is_control(self, token: int) -> bool:
        return token >= 0 and self.bytes[token] is None


class TextEncoder:
    """Encodes text with the teacher's tokenizer.

    Text that looks like a special token is text, since the student has read it as such; but not to Unigram models,
    which have those tokens among their pieces.
    """

    def __init__(self, tokenizer: Any, tokens: Tokens) -> None:
        self._tokens = tokens
        self._inner = {at_start: _plain(unwrapped(tokenizer), adds_space=at_start) for at_start in (True, False)}

    def __call__(self, text: str, *, at_start: bool) -> tuple[list[int], list[int]]:
        """Token ids, and where each ends, in bytes of `text`: at or behind the last byte that it was made of.

        `at_start`: whether a document starts with the text. If so, the tokenizer may put a space in front.
        """
        tokenizer = self._inner[at_start]
        offsets: list[tuple[int, int]] = []
        if isinstance(tokenizer, Encoding):
            ids = tokenizer.encode_ordinary(text)
        else:
            tokenizer.encode_special_tokens = True  # set here, since a worker's copy of it has forgotten it
            encoding = tokenizer.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        ends_M = self._tokens.lengths[ids].cumsum()
        data = b"".join(self._tokens.bytes[i] or b"" for i in ids)
        if data == text.encode():
            return ids, ends_M.tolist()
        prefix = self._tokens.leading_space if at_start else ""
        if data == (prefix + text).encode():
            return ids, np.maximum(ends_M - len(prefix), 0).tolist()
        # The text has been normalized, or has unknown characters in it: the library keeps track of them.
        if not offsets:
            return [], []
        byte_ends = np.array([0, *accumulate(len(character.encode()) for character in text)])
        return ids, np.maximum.accumulate(byte_ends[_character_ends(offsets, len(text))]).tolist()


def _character_ends(offsets: list[tuple[int, int]], length: int) -> list[int]:
    """Where each token ends in a text of so many characters, from the library's offsets.

    These name only the first of several characters that have been composed into one. The rest lies between a token and
    the next one: it has been read with the former.
    """
    ends = [0] * len(offsets)
    next_start, next_end = length, length
    for k in reversed(range(len(offsets))):
        start, end = offsets[k]
        ends[k] = next_start if next_start >= end else next_end
        next_start, next_end = start, ends[k]
    return ends


def _plain(tokenizer: Encoding | Tokenizer, *, adds_space: bool) -> Encoding | Tokenizer:
    """What encodes all of a text and nothing else; without `adds_space`, not even a space in front of it."""
    if isinstance(tokenizer, Encoding):
        return tokenizer
    state = json.loads(tokenizer.to_str())
    # The processor of byte-level BPE takes white space out of the tokens' offsets.
    state |= {"post_processor": None, "truncation": None, "padding": None}
    if not adds_space:
        for name in ("normalizer", "pre_tokenizer"):
            for part in parts(state[name]):
                part.update(_WITHOUT_SPACE.get(part["type"], {}))
    return Tokenizer.from_str(json.dumps(state))


def role_id(tokenizer: Any, role: str) -> int | None:
    """The token of a role, "bos" or "eos", as torchtitan's or `transformers`' tokenizer names it."""
    values = (getattr(tokenizer, name, None) for name in (f"{role}_id", f"{role}_token_id"))
    return next((value for value in values if isinstance(value, int)), None)


def match_controls(student: Tokens, teacher: Tokens) -> dict[int, int]:
    """The student's control tokens -> the teacher's of the same text or else of the same role."""
    by_name = {name: i for i, name in teacher.names.items()}
    by_role = {student.eos: teacher.eos} | ({} if teacher.bos is None else {student.bos: teacher.bos})
    matches = {i: by_name.get(name, by_role.get(i)) for i, name in student.names.items()}
    return {i: match for i, match in matches.items() if match is not None}


def match_bytes(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> np.ndarray:
    """By the student's id, the teacher's of the same bytes, int64; -1: none.

    Of several it is the one of the same id, or else the last: SentencePiece lists single bytes before its pieces.
    """
    by_bytes = {value: i for i, value in enumerate(teacher)}
    result = np.full(len(student), -1, dtype=np.int64)
    for i, value in enumerate(student):
        if value is not None:
            is_same = i < len(teacher) and teacher[i] == value
            result[i] = i if is_same else by_bytes.get(value, -1)
    return result


def teacher_pieces(student: Any, teacher: Any) -> list[list[int]]:
    """By the student's id, the teacher's tokens of the same text; none where the teacher has nothing for it.

    A token with the same bytes, or a control token of the same name or role, stands alone. Other text is encoded by the
    teacher's tokenizer, as from within a document; bytes that are no text, parts of a character, are looked up one by
    one. Takes tokenizers, and raises, as `alignment.Retokenizer`.
    """
    own, others = Tokens(student), Tokens(teacher)
    encode, ids = TextEncoder(teacher, others), {value: i for i, value in enumerate(others.bytes)}
    same, controls = match_bytes(own.bytes, others.bytes), match_controls(own, others)

    def pieces(token: int, value: bytes | None) -> list[int]:
        if value is None:
            return [controls[token]] if token in controls else []
        if same[token] >= 0:
            return [int(same[token])]
        try:
            return encode(value.decode(), at_start=False)[0]
        except UnicodeDecodeError:
            return [ids[byte] for byte in (value[k : k + 1] for k in range(len(value))) if byte in ids]

    return [pieces(token, value) for token, value in enumerate(own.bytes)]
