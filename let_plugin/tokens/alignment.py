"""A teacher with another tokenizer: its tokens of the student's text, and which of its states each student token meets.

What two tokenizers have in common are the bytes of the text. Here the student's tokens are turned into bytes, these are
encoded anew, and a student token meets the last teacher token that ends at or before its own end: what that teacher
token has seen is text that the student has seen as well.

A row begins and ends anywhere in a document, in a word or in a character too, and a part of a word may be encoded in
another way than the document was. So the word at such an edge is not encoded anew if its tokens are also the teacher's.
With two equal tokenizers the result is therefore the student's own row.

Shape legend: B batch, L the student's sequence, T the teacher's, N tokens of a document in the student's, M in the
teacher's tokenizer.
"""

import re
from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from let_plugin.tokens.encoding import TextEncoder, Tokens, match_bytes, match_controls

# In scripts without spaces the word at an edge has no end. After so many of the student's tokens any two letters are
# one: what is merged on one side of them does not depend on the other ...
_LONG_WORD = 16
# ... and after so many anything is.
_MAX_EDGE = 64
_LONE_BYTE = re.compile("[\udc80-\udcff]")


class RowAlignment(NamedTuple):
    """A row of the student's in the teacher's tokens."""

    tokens: list[int]  # the teacher's token ids, as many as it takes
    positions: list[int]  # theirs, which start again with each document of the student's row
    index_L: np.ndarray  # for each student token the number of the teacher's token that it meets, int64; -1: none
    is_exact_L: np.ndarray  # whether that token ends exactly where the student's does


class Retokenizer:
    """Makes the teacher's batch out of the student's: a function of the batch alone, for the data loader's workers.

    Of the tokenizers it calls `encode` alone, which starts no threads. So it can run in forked processes.

    `student` and `teacher` are tokenizers as `token_bytes` takes them, which raises ValueError for others. If both name
    tokens that begin and end a document (`bos_id` or `bos_token_id`, likewise eos), these are matched. What does not
    fit into `teacher_seq_len`, T, is cut off at a row's end.
    """

    def __init__(self, student: Any, teacher: Any, *, teacher_seq_len: int) -> None:
        self.teacher_seq_len = teacher_seq_len
        self._student = Tokens(student)
        self._teacher = Tokens(teacher)
        self._encoder = TextEncoder(teacher, self._teacher)
        self._controls = match_controls(self._student, self._teacher)
        self._same = match_bytes(self._student.bytes, self._teacher.bytes)

    def __call__(self, input_dict: dict[str, torch.Tensor], labels_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the teacher needs beside a batch: "input" [B, L], for packed documents "positions" [B, L], and labels.

        The labels tell whether a word goes on behind the row. All are int64: "teacher_tokens" [B, T];
        "teacher_positions" [B, T], if the batch has positions, where the padding is a document of its own;
        "teacher_index" [B, L]: the number, from 0 to T - 1, of the teacher's token whose state each token of the
        student's meets, -1 if there is none.
        """
        length = self.teacher_seq_len
        tokens, positions, indices = [], [], []
        for row in self.rows(input_dict, labels_BL):
            num_padding = max(0, length - len(row.tokens))
            tokens.append(row.tokens[:length] + [0] * num_padding)
            positions.append([*row.positions[:length], *range(num_padding)])
            indices.append(np.where(row.index_L < length, row.index_L, -1))
        extras = {"teacher_tokens": torch.tensor(tokens), "teacher_index": torch.from_numpy(np.stack(indices))}
        return extras | ({"teacher_positions": torch.tensor(positions)} if "positions" in input_dict else {})

    def rows(self, input_dict: dict[str, torch.Tensor], labels_BL: torch.Tensor) -> Iterator[RowAlignment]:
        """The rows of a batch one by one, before they are cut and padded to T; arguments as in a call."""
        tokens = input_dict["input"].tolist()
        positions = input_dict["positions"].tolist() if "positions" in input_dict else [[0]] * len(tokens)
        return map(self._row, tokens, positions, labels_BL.tolist())

    def _row(self, tokens: list[int], positions: list[int], labels: list[int]) -> RowAlignment:
        starts = [0, *(i for i, position in enumerate(positions) if position == 0 and i > 0)]
        teacher_tokens: list[int] = []
        teacher_positions: list[int] = []
        indices, exact = [], []
        for start, stop in pairwise([*starts, len(tokens)]):
            document = tokens[start:stop]
            # What a row begins with may be the rest of a document.
            made = list(self._document(document, labels[stop - 1], is_start=start > 0))
            ends_N = self._student.lengths[document].cumsum()
            # Of a token that ends nowhere, for those of the student's that meet none.
            ends_M = np.array([-1, *(end for _, end in made)])
            index_N = np.searchsorted(ends_M, ends_N, side="right") - 1
            exact.append(ends_M[index_N] == ends_N)
            indices.append(np.where(index_N > 0, index_N - 1 + len(teacher_tokens), -1))
            teacher_tokens += (token for token, _ in made)
            teacher_positions += range(positions[start], positions[start] + len(made))
        return RowAlignment(teacher_tokens, teacher_positions, np.concatenate(indices), np.concatenate(exact))

    def _document(self, tokens: list[int], follower: int, *, is_start: bool) -> Iterator[tuple[int, int]]:
        """A document in the teacher's tokens: the id of each, and where its bytes end.

        `tokens` are the student's of it that are in the row, `follower` is behind them, which may be no token's id;
        `is_start`: whether its first token is the document's, too.
        """
        end = i = 0
        for is_control, group in groupby(tokens, self._student.is_control):
            run = list(group)
            if is_control:
                yield from ((self._controls[t], end + n) for n, t in enumerate(run, 1) if t in self._controls)
                end += len(run)
            else:
                is_last = i + len(run) == len(tokens)
                text = _Text(
                    [self._student.bytes[token] or b"" for token in run],
                    starts=is_start if i == 0 else tokens[i - 1] in (self._student.bos, self._student.eos),
                    is_cut_left=i == 0 and not is_start,
                    is_cut_right=is_last and not self._student.is_control(follower),
                    follower=self._student.bytes[follower] if is_last and follower >= 0 else None,
                )
                yield from ((token, end + e) for token, e in self._text(run, text))
                end += sum(map(len, text.pieces))
            i += len(run)

    def _text(self, tokens: list[int], text: "_Text") -> Iterator[tuple[int, int]]:
        """The same of a run of text."""
        left, right = text.edges()
        same = self._same[tokens]
        if (same[:left] < 0).any():
            left = 0
        if (same[right:] < 0).any():
            right = len(tokens)
        ends_N = list(accumulate(map(len, text.pieces), initial=0))
        # These are not encoded anew. Those of them that the teacher has not are left out.
        is_kept = [True] * left + _broken(text.pieces[left:right]) + [True] * (len(tokens) - right)
        for kept, group in groupby(range(len(tokens)), is_kept.__getitem__):
            inner = list(group)
            if kept:
                yield from ((int(same[k]), ends_N[k + 1]) for k in inner if same[k] >= 0)
            else:
                new = b"".join(text.pieces[inner[0] : inner[-1] + 1]).decode()
                ids, ends = self._encode(new, starts=text.starts and inner[0] == 0)
                yield from zip(ids, (ends_N[inner[0]] + end for end in ends), strict=True)

    def _encode(self, text: str, *, starts: bool) -> tuple[list[int], list[int]]:
        # The space that the student's tokenizer has put in front of the document is not the document's. In front of a
        # text that begins with a space, some tokenizers put none.
        space = self._student.leading_space
        rest = text.removeprefix(space)
        if not (starts and text.startswith(space)) or (space and rest[:1] in ("", " ")):
            return self._encoder(text, at_start=False)
        ids, ends = self._encoder(rest, at_start=True)
        return ids, [len(space) + e for e in ends]


class _Text(NamedTuple):
    """A run of the student's text tokens."""

    pieces: list[bytes]
    starts: bool  # whether a document's text starts with it
    is_cut_left: bool  # whether a word may go on before it
    is_cut_right: bool
    follower: bytes | None  # the bytes of the token behind it, if known

    def edges(self) -> tuple[int, int]:
        """The first token behind the word at the left edge, and the first one of the word at the right edge.

        At an edge that cuts no word, 0 and the number of tokens. If all of it is at an edge, both are that number.
        """
        size = len(self.pieces)
        left, right = 0, size
        if self.is_cut_left:
            left = self._edge(range(min(size, _MAX_EDGE) + 1), far=size)
        if self.is_cut_right:
            right = self._edge(range(size, max(0, size - _MAX_EDGE) - 1, -1), far=0)
        return (left, right) if left <= right else (size, size)

    def _edge(self, boundaries: range, *, far: int) -> int:
        """The nearest of these boundaries at which a word begins, or between two letters if it is far away; else the
        far end of the text, if it is among them; else the farthest one that cuts no character."""
        for n, k in enumerate(boundaries):
            if self._begins_word(k) or (n >= _LONG_WORD and self._is_between_letters(k)):
                return k
        if far in boundaries:
            return far
        inner = (k for k in reversed(boundaries) if 0 < k < len(self.pieces))
        return next((k for k in inner if not b"\x80" <= self.pieces[k][:1] < b"\xc0"), boundaries[0])

    def _is_between_letters(self, k: int) -> bool:
        """Whether there are letters, or other characters beyond ASCII, before token k and at its beginning."""
        if not 0 < k < len(self.pieces):
            return False
        before, behind = self.pieces[k - 1][-1:], self.pieces[k][:1]
        return (before.isalpha() or before >= b"\x80") and (behind.isalpha() or behind >= b"\xc0")

    def _begins_word(self, k: int) -> bool:
        """Whether tokens begin at the boundary before token k in any tokenizer, whatever is on its other side.

        They do where white space begins, and where its last space does, if it is one of the word's own token.
        """
        piece = self.pieces[k] if k < len(self.pieces) else self.follower
        if not piece:
            return False
        if piece[:1] == b" " and piece[1:2].strip():
            return True
        return k > 0 and piece[:1].isspace() and not self.pieces[k - 1][-1:].isspace()


def _broken(pieces: list[bytes]) -> list[bool]:
    """Which tokens have a part of a character whose other parts are not there."""
    # Python decodes each byte of such a part to a character of its own.
    text = b"".join(pieces).decode(errors="surrogateescape")
    broken = {len(text[: m.start()].encode(errors="surrogateescape")) for m in _LONE_BYTE.finditer(text)}
    return [not broken.isdisjoint(range(i, j)) for i, j in pairwise(accumulate(map(len, pieces), initial=0))]
