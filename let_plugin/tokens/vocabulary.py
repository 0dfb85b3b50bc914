"""A teacher's tokenizer: found and opened, and its vocabulary compared with the student's."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.tokens.tiktoken import TikTokenTokenizer, rank_files

_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def open_tokenizer(config: TeacherConfig) -> Any | None:
    """The tokenizer in `let.teacher.tokenizer_path`, or else in the teacher's own folder or hub repository.

    tokenizer.json and Llama-3's rank file are read as torchtitan's tokenizers read them, so that a student and a
    teacher with the same files have the same tokenizer. Other files go through AutoTokenizer of `transformers`.

    Returns:
        None if the teacher comes without a tokenizer.

    Raises:
        ConfigError: If the tokenizer cannot be read, or there is none in `tokenizer_path`.
    """
    key = "let.teacher.tokenizer_path" if config.tokenizer_path else "let.teacher.path"
    path = config.tokenizer_path or config.path
    is_folder = os.path.isdir(path)
    if is_folder:
        try:
            if Path(path, "tokenizer.json").is_file():
                return HuggingFaceTokenizer(tokenizer_path=path)
            if rank_files(path):
                return TikTokenTokenizer.Config().build(tokenizer_path=path)
        except ConfigError as error:
            message = f"of tiktoken rank files, Llama-3's alone can be a teacher's ({error.problems[0].message}); "
            raise ConfigError(Problem(key, f"{message}give a folder with a tokenizer.json", path)) from error
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConfigError(Problem(key, f"tokenizer.json cannot be read: {error}", path)) from error
    if config.tokenizer_path and not (is_folder and _has_files(path)):
        raise ConfigError(Problem(key, "no tokenizer there; give a folder with tokenizer.json or leave it empty", path))
    if not path or (is_folder and not _has_files(path)):
        return None
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            path, local_files_only=is_folder, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # a package or a file that is missing or damaged, the hub
        message = f"its tokenizer cannot be read: {error}"
        if "trust_remote_code" in message:
            message = "its tokenizer is Python code of its own; set let.teacher.trust_remote_code if you trust it"
        raise ConfigError(Problem(key, message, path)) from error


def _has_files(folder: str) -> bool:
    return any(Path(folder, name).is_file() for name in _FILES)


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
    """Compares what each of the student's ids means to the teacher. Ids that only the teacher has do not matter."""
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
