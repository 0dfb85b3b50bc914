"""Text for a teacher to predict: its own tokenizer, and documents to read."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import data
from let_plugin.tokens.tiktoken import TikTokenTokenizer
from let_plugin.tokens.vocabulary import described_tokenizer
from let_plugin.tokens.vocabulary import read_tokenizer as read_folder


class TextTokenizer:
    """A tokenizer of the `tokenizers` library, any of `transformers`, or one of a tiktoken rank file.

    Args:
        inner: The tokenizer.
        bos_id: The token that begins a document; None: it has none.

    Attributes:
        max_id: Its largest id.
    """

    def __init__(self, inner: Any, bos_id: int | None) -> None:
        self._inner = inner
        self._bos_id = bos_id
        self._vocabulary = inner.get_vocab()
        self.max_id = max(self._vocabulary.values())

    def __str__(self) -> str:
        if isinstance(self._inner, TikTokenTokenizer):
            return f"tiktoken, byte-level, {len(self._vocabulary):,} tokens"
        backend = getattr(self._inner, "backend_tokenizer", self._inner)
        kind = type(getattr(backend, "model", backend)).__name__
        is_byte_level = type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"
        return f"{kind}{', byte-level' if is_byte_level else ''}, {len(self._vocabulary):,} tokens"

    def encode(self, text: str, *, max_tokens: int) -> tuple[list[int], int]:
        """Token ids of (the beginning of) a document, and how many bytes of text all but the first of them stand for.

        A document begins with the tokenizer's own beginning-of-sequence token, if it has one, and ends without any.
        """
        if isinstance(self._inner, TikTokenTokenizer):
            ids = self._inner.encode(text)
        else:
            ids = self._inner.encode(text, add_special_tokens=False)
            ids = list(getattr(ids, "ids", ids))
        num_bytes = len(text.encode())
        num_first = 0 if self._bos_id is not None else 1  # predicted from nothing: not at all
        if len(ids) > max_tokens + num_first:
            ids = ids[: max_tokens + num_first]
            num_bytes = self._num_bytes(ids)
        num_bytes -= self._num_bytes(ids[:num_first])
        return ([] if self._bos_id is None else [self._bos_id]) + ids, num_bytes

    def _num_bytes(self, ids: list[int]) -> int:
        return len(self._inner.decode(ids).encode()) if ids else 0


def read_tokenizer(config: TeacherConfig) -> TextTokenizer | None:
    """The teacher's tokenizer, from `tokenizer_path` or what lies with its weights; None if there is none.

    ConfigError if there is one that cannot be read, or none in `tokenizer_path`.
    """
    folder = config.tokenizer_path or config.path
    key = "let.teacher.tokenizer_path" if config.tokenizer_path else "let.teacher.path"
    own = described_tokenizer(config) if config.tiktoken else read_folder(folder, key=key)
    if own is not None:
        return TextTokenizer(own if isinstance(own, TikTokenTokenizer) else own.tokenizer, own.bos_id)
    if config.tokenizer_path:
        raise ConfigError(Problem(key, "no tokenizer.json or tiktoken rank file there", folder))
    if config.spec:
        return None
    if os.path.isfile(config.path):
        from let_plugin.teacher.hf.gguf import load_tokenizer

        tokenizer = load_tokenizer(config.path)
        return TextTokenizer(tokenizer, tokenizer.bos_token_id)
    from let_plugin.tokens.hf_tokenizers import load_tokenizer as load_with_transformers

    loaded = load_with_transformers(config.path, key)
    return None if loaded is None else TextTokenizer(loaded, loaded.bos_token_id)


def demo_text() -> Iterable[str]:
    """The demo's test split, summaries of Wikipedia articles, on which nothing was trained or chosen."""
    return data.load_text_files(data.TEXT["test"])["text"]


def read_documents(path: str) -> Iterable[str]:
    """The documents of a file: a .txt file is one; the others have one per line or row, in the field "text".

    ConfigError, naming --text, if it cannot be read.
    """
    data.find_text_files(path, key="--text")
    try:
        if path.endswith(".txt"):
            return [Path(path).read_text(encoding="utf-8")]
        return data.load_text_files(path)["text"]
    except ConfigError as error:
        raise ConfigError([Problem("--text", problem.message, path) for problem in error.problems]) from error
    except Exception as error:  # the datasets library has types of its own for a damaged file
        raise ConfigError(Problem("--text", f"cannot be read: {error}", path)) from error
