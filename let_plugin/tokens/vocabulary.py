"""A teacher's tokenizer: found and opened, and its vocabulary compared with the student's."""

import os
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.tokens.tiktoken import TikTokenTokenizer, rank_file

_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def open_tokenizer(config: TeacherConfig) -> Any | None:
    """The tokenizer in `let.teacher.tokenizer_path`, or else in the teacher's own folder.

    tokenizer.json and Llama-3's rank file are read as torchtitan's tokenizers read them, so that a student and a
    teacher with the same files have the same tokenizer. Other files go through AutoTokenizer of `transformers`. None
    if the teacher comes without a tokenizer; ConfigError if it cannot be read, or there is none in `tokenizer_path`.
    """
    key = "let.teacher.tokenizer_path" if config.tokenizer_path else "let.teacher.path"
    path = config.tokenizer_path or config.path
    try:
        if Path(path, "tokenizer.json").is_file():
            return HuggingFaceTokenizer(tokenizer_path=path)
        if os.path.isdir(path) and rank_file(path) is not None:
            return TikTokenTokenizer.Config().build(tokenizer_path=path)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(Problem(key, f"tokenizer.json cannot be read: {error}", path)) from error
    if not any(Path(path, name).is_file() for name in _FILES):
        if not config.tokenizer_path:
            return None
        raise ConfigError(Problem(key, "no tokenizer there; give a folder with tokenizer.json or leave it empty", path))
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a package or a file that is missing or damaged
        message = f"its tokenizer cannot be read: {error}"
        if "trust_remote_code" in message:
            message = "its tokenizer is Python code of its own; set let.teacher.trust_remote_code if you trust it"
        raise ConfigError(Problem(key, message, path)) from error


def compare_vocabularies(student: dict[str, int], teacher: dict[str, int]) -> list[str]:
    """The student's ids that are another token to the teacher, in order: "id 5: 'a' (student), 'b' (teacher)".

    Ids that only the teacher has do not matter.
    """
    teacher_tokens = {i: token for token, i in teacher.items()}
    return [
        f"id {i}: {token!r} (student), {teacher_tokens.get(i, 'no such id')!r} (teacher)"
        for token, i in sorted(student.items(), key=lambda item: item[1])
        if teacher_tokens.get(i) != token
    ]
