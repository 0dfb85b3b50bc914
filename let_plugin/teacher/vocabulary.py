"""Vocabularies: read from a tokenizer's files, and compared token by token."""

import os
from dataclasses import dataclass

from tokenizers import Tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.errors import ConfigError, Problem


def read_vocabulary(folder: str) -> dict[str, int] | None:
    """Token -> id from `folder`/tokenizer.json, special tokens included; None if there is no such file."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        return None
    return Tokenizer.from_file(path).get_vocab(with_added_tokens=True)


def read_tokenizer(folder: str, *, key: str) -> HuggingFaceTokenizer | None:
    """The tokenizer in `folder`/tokenizer.json; None if there is no such file. ConfigError, naming `key`, if it cannot
    be read.

    torchtitan's own reader: of the same files a student and its teacher have the same tokenizer.
    """
    if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return None
    try:
        return HuggingFaceTokenizer(tokenizer_path=folder)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(Problem(key, f"the tokenizer cannot be read: {error}", folder)) from error


@dataclass(frozen=True)
class VocabularyDifference:
    """How two vocabularies differ, id by id.

    Attributes:
        num_differing: Number of the student's ids that are another token, or none, for the teacher.
        num_student: Number of the student's ids.
        examples: A few of them: "id 5: 'the' (student), 'a' (teacher)".
    """

    num_differing: int
    num_student: int
    examples: list[str]


def compare_vocabularies(student: dict[str, int], teacher: dict[str, int]) -> VocabularyDifference:
    """Compares what each id of the student's means to the teacher. Ids that only the teacher has do not matter."""
    teacher_tokens = {i: token for token, i in teacher.items()}
    differing = sorted((i, token) for token, i in student.items() if teacher_tokens.get(i) != token)
    return VocabularyDifference(
        num_differing=len(differing),
        num_student=len(student),
        examples=[
            f"id {i}: {token!r} (student), {teacher_tokens.get(i, 'no such id')!r} (teacher)"
            for i, token in differing[:3]
        ],
    )
