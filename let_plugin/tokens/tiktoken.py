"""A tokenizer for torchtitan that reads a tiktoken rank file, such as Llama-3's tokenizer.model.

A rank file has one `token rank` per line, the token in base64. A token's rank is its id, and the order in which pairs
are merged. The file does not say how text is split before that, nor which special tokens there are. Both are options;
of Llama-3's file, which is recognized by its SHA-256, they are known.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from tiktoken import Encoding
from torchtitan.components.tokenizer import BaseTokenizer

from let_plugin.config.errors import ConfigError, Problem, suggest
from let_plugin.tokens.token_bytes import byte_level

# Of Meta's llama-models, models/llama3/tokenizer.py.
LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}

_NAMES = ("tokenizer.model", "tiktoken.model")
_LINE = re.compile(rb"(?=\S)(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)? \d{1,9}")  # base64, rank
# tiktoken's regular expressions overflow their stack in runs of about a million characters. The limit is that of
# Llama-3's own code, so that the ids are the same.
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_MAX_RUN + 1},}}|(?<!\s)\s{{{_MAX_RUN + 1},}}")
# Something of every kind that a pattern may tell apart.
_SAMPLE = "It's \u00c9t\u00e9 12345,\t\u4f60\u597d e\u0301  \u00a0\r\n \u0000#/ \U0001f600\n\n  "


def llama3_special_tokens() -> dict[str, int]:
    """Token -> id of Llama-3's 256 special tokens; those without a use are numbered."""
    reserved = (f"reserved_special_token_{i}" for i in count())
    return {f"<|{_LLAMA3_NAMES.get(i) or next(reserved)}|>": 128_000 + i for i in range(256)}


class TikTokenTokenizer(BaseTokenizer):
    """Byte-level BPE by tiktoken, of a rank file in the folder `tokenizer_path`.

    Text is text: what looks like a special token in it becomes ordinary tokens. `decode` gives any text back, except
    for lone surrogates, which become U+FFFD. ConfigError if the file is missing or damaged, or the configuration does
    not fit it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        rank_file: str = ""
        """In `hf_assets_path`. Empty: the only one there (*.tiktoken, tokenizer.model or tiktoken.model)."""

        pattern: str = ""
        """Regular expression whose matches are the pieces of a text. Empty: Llama-3's, for Llama-3's file."""

        special_tokens: dict[str, int] = field(default_factory=dict)
        """Token -> id. Empty: Llama-3's, for Llama-3's file."""

        bos_token: str | None = None
        """The special token that begins a document; "": none. Not given: Llama-3's, with its special tokens."""

        eos_token: str | None = None
        """The special token that ends a document. Not given: Llama-3's, with its special tokens."""

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()
        if config.rank_file:
            path, key = Path(tokenizer_path, config.rank_file), "tokenizer.rank_file"
        else:
            path, key = _find(tokenizer_path), "hf_assets_path"
        ranks, is_llama3 = _read(path, key)
        if is_llama3:
            config = _with_llama3_defaults(config)
        if problems := _problems(config, path, ranks):
            raise ConfigError(problems)
        assert config.eos_token
        pattern, special = config.pattern, config.special_tokens
        try:
            self.tokenizer = Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except ValueError as error:
            raise ConfigError(Problem("tokenizer.pattern", f"not a regular expression: {error}", pattern)) from error
        self._vocabulary = {byte_level(token): rank for token, rank in ranks.items()} | special
        self.bos_token, self.eos_token = config.bos_token or None, config.eos_token
        self.bos_id = special[self.bos_token] if self.bos_token else None
        self.eos_id = special[self.eos_token]
        if self.decode(self.encode(_SAMPLE)) != _SAMPLE:
            message = "loses text that it does not match; it must match every character"
            raise ConfigError(Problem("tokenizer.pattern", message, pattern))

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The ids of `text`, with those that begin and end a document if asked for (and if there are such)."""
        ids = [self.bos_id] if add_bos and self.bos_id is not None else []
        for piece in _without_long_runs(text):
            ids += self.tokenizer.encode_ordinary(piece)
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD. KeyError for an unknown id."""
        if skip_special_tokens:
            token_ids = [i for i in token_ids if not self.tokenizer.is_special_token(i)]
        return self.tokenizer.decode(list(token_ids))

    def get_vocab_size(self) -> int:
        """The largest id plus one: what an embedding needs. There are fewer tokens if there are gaps."""
        return self.tokenizer.n_vocab

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, special tokens included, written as in the tokenizer.json of the same vocabulary."""
        return self._vocabulary


def rank_files(folder: str) -> list[Path]:
    """The rank files in `folder`. SentencePiece calls its files tokenizer.model too: these are left out."""
    names = sorted(path for path in Path(folder).glob("*") if path.is_file())
    return [path for path in names if path.suffix == ".tiktoken" or (path.name in _NAMES and _has_ranks(path))]


def _has_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096).rstrip(b"\r\n")) is not None


def _find(folder: str) -> Path:
    found = rank_files(folder)
    if not found:
        message = "no tiktoken rank file there (*.tiktoken, tokenizer.model or tiktoken.model); name it by rank_file"
        raise ConfigError(Problem("hf_assets_path", f"{message} in [tokenizer]", folder))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        message = f"more than one tiktoken rank file in {folder} ({names}): name one, or keep one"
        raise ConfigError(Problem("tokenizer.rank_file", message))
    return found[0]


def _read(path: Path, key: str) -> tuple[dict[bytes, int], bool]:
    """Token -> rank, and whether it is Llama-3's file. ConfigError of the field `key` if it is missing or damaged."""
    # Not by tiktoken.load, which goes by a copy that it keeps of each path: an edited file would be read as it was.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(Problem(key, f"cannot be read: {error.strerror}", str(path))) from error
    lines, ranks, message = [line for line in content.splitlines() if line], {}, ""
    if bad := next((line for line in lines if not _LINE.fullmatch(line)), b""):
        message = f'{bad[:40].decode(errors="replace")!r} is not "token in base64, space, rank"'
    else:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        if not len(lines) == len(ranks) == len(set(ranks.values())):
            message = "it has a token or a rank twice"
        elif num_missing := sum(bytes([byte]) not in ranks for byte in range(256)):
            message = f"{num_missing} of the 256 single bytes are not in it"
    if message:
        raise ConfigError(Problem(key, f"not a tiktoken rank file: {message}", str(path)))
    return ranks, hashlib.sha256(content).hexdigest() == LLAMA3_SHA256


def _with_llama3_defaults(config: TikTokenTokenizer.Config) -> TikTokenTokenizer.Config:
    config = replace(config, pattern=config.pattern or LLAMA3_PATTERN)
    if config.special_tokens:
        return config
    bos = "<|begin_of_text|>" if config.bos_token is None else config.bos_token
    eos = config.eos_token or "<|end_of_text|>"
    return replace(config, special_tokens=llama3_special_tokens(), bos_token=bos, eos_token=eos)


def _problems(config: TikTokenTokenizer.Config, path: Path, ranks: dict[bytes, int]) -> list[Problem]:
    """What the rank file lacks, and the special tokens that do not fit its ranks."""
    if not config.pattern:
        message = f"{path} does not say how text is split before tokens are looked for: give the regular expression"
        return [Problem("tokenizer.pattern", message)]
    if not config.special_tokens:
        return [Problem("tokenizer.special_tokens", f"{path} names none: give a table, token = id")]
    taken = {rank: repr(token) for token, rank in ranks.items()}
    ordinary = {byte_level(token) for token in ranks}
    problems = []
    for token, i in config.special_tokens.items():
        message = ""
        if i in taken:
            message = f"that id is taken by {taken[i]}"
        elif not 0 <= i < 2**31:
            message = "must be an id, 0 or more"
        elif not token or token in ordinary:
            message = f"there is an ordinary token of that name in {path}"
        if message:
            problems.append(Problem(f"tokenizer.special_tokens.{token}", message, i))
        taken.setdefault(i, repr(token))
    for name, role in (("bos_token", config.bos_token), ("eos_token", config.eos_token)):
        if role and role not in config.special_tokens:
            message = f"not a special token; {suggest(role, config.special_tokens)}"
            problems.append(Problem(f"tokenizer.{name}", message, role))
    if not config.eos_token:
        message = f"missing: which special token ends a document? {suggest('end of text', config.special_tokens)}"
        problems.append(Problem("tokenizer.eos_token", message))
    return problems


def _without_long_runs(text: str) -> Iterator[str]:
    """The text in pieces, none with more than 25,000 characters of white space, or of others, in a row."""
    start = 0
    if len(text) > _MAX_RUN:
        for run in _LONG_RUN.finditer(text):
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield text[start:end]
                start = end
    yield text[start:]
