"""Vocabularies: read from a tokenizer's files, and compared token by token."""

import os
from dataclasses import dataclass, replace

from tokenizers import Tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin import rank_files
from let_plugin.errors import ConfigError, Problem
from let_plugin.tiktoken_tokenizer import TikTokenTokenizer


class WithoutSpecialTokens(dict[str, int]):
    """The vocabulary of a file that names no special tokens, though the model that it belongs to may know some."""


def read_vocabulary(folder: str, *, key: str = "let.teacher.tokenizer_path") -> dict[str, int] | None:
    """Token -> id from `folder`/tokenizer.json, or else from the tiktoken rank file there; special tokens included.

    A rank file's tokens are written as in the tokenizer.json of byte-level BPE, so that the two can be compared. It is
    a WithoutSpecialTokens if neither a tokenizer_config.json beside it nor its content tells them.

    None if there is no such file; a ConfigError of the field `key` if it cannot be read.
    """
    path = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(path):
        try:
            return Tokenizer.from_file(path).get_vocab(with_added_tokens=True)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConfigError(Problem(key, f"tokenizer.json cannot be read: {error}", folder)) from error
    found = rank_files.find(folder, key=key)
    if found is None:
        return None
    file = rank_files.read(found, key=key)
    special = file.special_tokens()
    if special is None:
        return WithoutSpecialTokens(rank_files.vocabulary(file.ranks, {}))
    return rank_files.vocabulary(file.ranks, special.ids)


def read_tokenizer(folder: str, *, key: str) -> HuggingFaceTokenizer | TikTokenTokenizer | None:
    """The tokenizer of `folder`/tokenizer.json, or else of the tiktoken rank file there; None if there is neither.

    By the same readers as a student's, so that of the same files both have the same. ConfigError, naming `key`, if it
    cannot be read.
    """
    try:
        if os.path.isfile(os.path.join(folder, "tokenizer.json")):
            return HuggingFaceTokenizer(tokenizer_path=folder)
        if rank_files.find(folder, key=key) is not None:
            return TikTokenTokenizer.Config().build(tokenizer_path=folder)
    except ConfigError as error:
        raise ConfigError([replace(problem, key=key) for problem in error.problems]) from error
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(Problem(key, f"the tokenizer cannot be read: {error}", folder)) from error
    return None


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
    """Compares what each id of the student's means to the teacher. Ids that only the teacher has do not matter.

    Nor do those that a teacher WithoutSpecialTokens lacks: nothing is known of them.
    """
    teacher_tokens = {i: token for token, i in teacher.items()}
    unknown = student.values() - teacher_tokens.keys() if isinstance(teacher, WithoutSpecialTokens) else ()
    differing = sorted(
        (i, token) for token, i in student.items() if teacher_tokens.get(i) != token and i not in unknown
    )
    return VocabularyDifference(
        num_differing=len(differing),
        num_student=len(student),
        examples=[
            f"id {i}: {token!r} (student), {teacher_tokens.get(i, 'no such id')!r} (teacher)"
            for i, token in differing[:3]
        ],
    )
