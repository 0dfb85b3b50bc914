"""Vocabularies: read from a tokenizer's files, and compared token by token."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.config import TeacherConfig, options
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.tokens import rank_files
from let_plugin.tokens.tiktoken import TikTokenTokenizer

_TIKTOKEN_KEY = "let.teacher.tiktoken"


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
    found = _find_rank_file(folder)
    return None if found is None else _vocabulary(rank_files.read(found, key=key))


def read_tokenizer(folder: str, *, key: str) -> HuggingFaceTokenizer | TikTokenTokenizer | None:
    """The tokenizer of `folder`/tokenizer.json, or else of the tiktoken rank file there; None if there is neither.

    By the same readers as a student's, so that of the same files both have the same. ConfigError if it cannot be read
    (naming `key`), or the rank file needs `let.teacher.tiktoken`.
    """
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        try:
            return HuggingFaceTokenizer(tokenizer_path=folder)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConfigError(Problem(key, f"the tokenizer cannot be read: {error}", folder)) from error
    if _find_rank_file(folder) is None:
        return None
    with _keys_of_the_teacher(key):
        return TikTokenTokenizer.Config().build(tokenizer_path=folder)


def described_vocabulary(config: TeacherConfig) -> dict[str, int]:
    """Token -> id of the rank file that `let.teacher.tiktoken` is about; as `read_vocabulary` if it only says where.

    ConfigError as `described_tokenizer`.
    """
    if config.tiktoken.keys() != {"rank_file"}:
        return described_tokenizer(config).get_vocab()
    folder, _ = _folder(config)
    path = Path(folder, rank_file_options(config).rank_file)
    return _vocabulary(rank_files.read(path, key=f"{_TIKTOKEN_KEY}.rank_file"))


def described_tokenizer(config: TeacherConfig) -> TikTokenTokenizer:
    """The tokenizer of the rank file that `let.teacher.tiktoken` is about, though a tokenizer.json be there as well.

    ConfigError if there is no such file, or it and the table do not fit.
    """
    tokenizer_config = rank_file_options(config)
    folder, key = _folder(config)
    if not tokenizer_config.rank_file and (not os.path.isdir(folder) or _find_rank_file(folder) is None):
        message = f"is for a tiktoken rank file, and there is none in {key} = {folder!r}: leave it out"
        raise ConfigError(Problem(_TIKTOKEN_KEY, f"{message}, or name the file by its rank_file", config.tiktoken))
    with _keys_of_the_teacher(key):
        return tokenizer_config.build(tokenizer_path=folder)


def rank_file_options(config: TeacherConfig) -> TikTokenTokenizer.Config:
    """The table `let.teacher.tiktoken`. ConfigError for a name or a type that is not among its options."""
    made: TikTokenTokenizer.Config = options.bind(TikTokenTokenizer.Config, config.tiktoken, key=_TIKTOKEN_KEY)()
    return made


def _folder(config: TeacherConfig) -> tuple[str, str]:
    """Where the teacher's tokenizer is, and the key that says so."""
    if config.tokenizer_path:
        return config.tokenizer_path, "let.teacher.tokenizer_path"
    return config.path, "let.teacher.path"


def _find_rank_file(folder: str) -> Path | None:
    return rank_files.find(folder, key=f"{_TIKTOKEN_KEY}.rank_file")


def _vocabulary(file: rank_files.RankFile) -> dict[str, int]:
    special = file.special_tokens()
    if special is None:
        return WithoutSpecialTokens(rank_files.vocabulary(file.ranks, {}))
    return rank_files.vocabulary(file.ranks, special.ids)


@contextmanager
def _keys_of_the_teacher(folder_key: str) -> Iterator[None]:
    """A student's tokenizer calls its table `tokenizer`, and its folder `hf_assets_path`."""

    def renamed(key: str) -> str:
        if key.startswith("tokenizer."):
            return f"{_TIKTOKEN_KEY}{key.removeprefix('tokenizer')}"
        return folder_key if key == "hf_assets_path" else key

    try:
        yield
    except ConfigError as error:
        raise ConfigError([replace(problem, key=renamed(problem.key)) for problem in error.problems]) from error


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
