"""Llama-3's tokenizer.model, a tiktoken rank file, for torchtitan.

A rank file has one `token rank` per line, the token in base64. A token's rank is its id, and the order in which pairs
are merged. The file does not say how text is split before that, nor which special tokens there are: of Llama-3's, which
is recognized by its SHA-256, they are known. Any other has to be converted to a tokenizer.json.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tiktoken import Encoding
from torchtitan.components.tokenizer import BaseTokenizer

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.tokens.token_bytes import byte_level

# Of Meta's llama-models, models/llama3/tokenizer.py.
LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}

# tiktoken's regular expressions overflow their stack in runs of about a million characters. The limit is that of
# Llama-3's own code, so that the ids are the same.
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_MAX_RUN + 1},}}|(?<!\s)\s{{{_MAX_RUN + 1},}}")


class TikTokenTokenizer(BaseTokenizer):
    """Byte-level BPE by tiktoken, of Llama-3's rank file in the folder `tokenizer_path`. ConfigError if it has none.

    Text is text: what looks like a special token in it becomes ordinary tokens. `decode` gives any text back, except
    for lone surrogates, which become U+FFFD.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()
        path = rank_file(tokenizer_path)
        if path is None:
            message = "Llama-3's tokenizer.model is not there (by its SHA-256); convert others to a tokenizer.json"
            raise ConfigError(Problem("hf_assets_path", message, tokenizer_path))
        reserved = (f"reserved_special_token_{i}" for i in count())
        special = {f"<|{_LLAMA3_NAMES.get(i) or next(reserved)}|>": 128_000 + i for i in range(256)}
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.open("rb"))}
        self.tokenizer = Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self._vocabulary = {byte_level(token): rank for token, rank in ranks.items()} | special
        self.bos_token, self.eos_token = "<|begin_of_text|>", "<|end_of_text|>"
        self.bos_id, self.eos_id = special[self.bos_token], special[self.eos_token]

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The ids of `text`, with those that begin and end a document if asked for."""
        ids = [self.bos_id] if add_bos else []
        for piece in _without_long_runs(text):
            ids += self.tokenizer.encode_ordinary(piece)
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD. KeyError for an unknown id."""
        if skip_special_tokens:
            token_ids = [i for i in token_ids if not self.tokenizer.is_special_token(i)]
        return self.tokenizer.decode(list(token_ids))

    def get_vocab_size(self) -> int:
        return self.tokenizer.n_vocab

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, special tokens included, written as in the tokenizer.json of the same vocabulary."""
        return self._vocabulary


def rank_file(folder: str) -> Path | None:
    """Llama-3's in `folder`, whatever its name; None if there is none."""
    for path in sorted(file for ending in ("model", "tiktoken") for file in Path(folder).glob(f"*.{ending}")):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == LLAMA3_SHA256:
            return path
    return None


def _without_long_runs(text: str) -> Iterator[str]:
    """The text in pieces, none with more than 25,000 characters of white space, or of others, in a row."""
    start = 0
    if len(text) > _MAX_RUN:
        for run in _LONG_RUN.finditer(text):
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield text[start:end]
                start = end
    yield text[start:]
