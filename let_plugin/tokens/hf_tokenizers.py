"""Tokenizers beside a teacher in Hugging Face format: by torchtitan's own readers, else through `transformers`."""

import os
from pathlib import Path
from typing import Any

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.tokens.vocabulary import read_tokenizer, read_vocabulary

_TOKENIZER_KEY = "let.teacher.tokenizer_path"
_TOKENIZER_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def read_tokenizer_path(path: str) -> dict[str, int]:
    """Token -> id of the tokenizer in the folder `let.teacher.tokenizer_path`; ConfigError if there is none."""
    vocabulary = read_vocabulary_of(path, _TOKENIZER_KEY) if os.path.isdir(path) else None
    if vocabulary is None:
        raise ConfigError(_no_tokenizer(path))
    return vocabulary


def open_tokenizer_path(path: str) -> Any:
    """The tokenizer in the folder `let.teacher.tokenizer_path`; ConfigError if there is none."""
    tokenizer = open_tokenizer(path, _TOKENIZER_KEY) if os.path.isdir(path) else None
    if tokenizer is None:
        raise ConfigError(_no_tokenizer(path))
    return tokenizer


def _no_tokenizer(path: str) -> Problem:
    message = "no tokenizer there; give a folder with tokenizer.json or a tiktoken rank file, or leave it empty"
    return Problem(_TOKENIZER_KEY, message, path)


def read_vocabulary_of(folder: str, key: str) -> dict[str, int] | None:
    """Token -> id of the tokenizer in a folder; None if there is none. ConfigError if it cannot be read."""
    vocabulary = read_vocabulary(folder, key=key)
    return vocabulary_with_transformers(folder, key) if vocabulary is None else vocabulary


def open_tokenizer(path: str, key: str) -> Any | None:
    """The tokenizer of a folder or of a teacher on the hub; None if there is none. ConfigError if it cannot be read."""
    return read_tokenizer(path, key=key) or load_tokenizer(path, key)


def vocabulary_with_transformers(path: str, key: str) -> dict[str, int] | None:
    """Through AutoTokenizer; None if there are no tokenizer files."""
    tokenizer = load_tokenizer(path, key)
    return None if tokenizer is None else tokenizer.get_vocab()


def load_tokenizer(path: str, key: str) -> Any:
    """The tokenizer of a folder or hub name, through AutoTokenizer; None if there are no tokenizer files.

    ConfigError, naming the field `key`, if it cannot be read.
    """
    from transformers import AutoTokenizer

    is_local = os.path.isdir(path)
    if is_local and not any(Path(path, name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=is_local)
    except Exception as error:  # missing sentencepiece, damaged files, the hub
        raise ConfigError(Problem(key, f"its tokenizer cannot be read: {error}", path)) from error
