"""tiktoken rank files: byte-level BPE vocabularies, one `token rank` per line, the token in base64.

The rank is the token's id, and the order in which pairs are merged. Such a file does not say how a text is split before
tokens are looked for, nor which special tokens there are: the widely used ones are known here, and told by their
SHA-256; a tokenizer_config.json beside the file may name the special tokens.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.tokens.token_bytes import byte_level

_NAMES = ("tokenizer.model", "tiktoken.model")
_LINE = re.compile(rb"([A-Za-z0-9+/]+=*) (\d{1,9})")
_ENDOFTEXT = "<|endoftext|>"


@dataclass(frozen=True)
class SpecialTokens:
    """Control tokens of a vocabulary.

    Attributes:
        ids: Token -> id.
        bos_token: The one that begins a document; None: none does.
        eos_token: The one that ends a document, if it is known.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    bos_token: str | None = None
    eos_token: str | None = None


@dataclass(frozen=True)
class KnownVocabulary:
    """What belongs to a published rank file.

    Attributes:
        sha256: Of the file, hexadecimal.
        num_ranks: Number of its tokens.
        pattern: The regular expression whose matches are the pieces of a text.
        special_tokens: Its control tokens.
    """

    sha256: str
    num_ranks: int
    pattern: str
    special_tokens: SpecialTokens


def _llama3(names: Mapping[int, str]) -> SpecialTokens:
    """256 ids from 128000 on: those of `names`, counted from 0, and between them reserved ones, numbered."""
    tokens, num_reserved = {}, 0
    for i in range(256):
        name = names.get(i)
        if name is None:
            name, num_reserved = f"reserved_special_token_{num_reserved}", num_reserved + 1
        tokens[f"<|{name}|>"] = 128000 + i
    return SpecialTokens(tokens, "<|begin_of_text|>", "<|end_of_text|>")


# Meta's llama-models, models/llama3/tokenizer.py, and the tokenizer.json of each release.
_LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
# tiktoken's own tiktoken_ext/openai_public.py.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The vocabularies that OpenAI published end a document, and begin none.
KNOWN: dict[str, KnownVocabulary] = {
    "llama3": KnownVocabulary(_LLAMA3_SHA256, 128000, _LLAMA3_PATTERN, _llama3(_LLAMA3_NAMES)),
    "llama3.1": KnownVocabulary(
        _LLAMA3_SHA256,
        128000,
        _LLAMA3_PATTERN,
        _llama3({**_LLAMA3_NAMES, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}),
    ),
    "gpt2": KnownVocabulary(
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",  # as r50k_base.tiktoken
        50256,
        _GPT2_PATTERN,
        SpecialTokens({_ENDOFTEXT: 50256}, eos_token=_ENDOFTEXT),
    ),
    "p50k_base": KnownVocabulary(
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        50280,
        _GPT2_PATTERN,
        SpecialTokens({_ENDOFTEXT: 50256}, eos_token=_ENDOFTEXT),
    ),
    "cl100k_base": KnownVocabulary(
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        100256,
        _CL100K_PATTERN,
        SpecialTokens(
            {
                _ENDOFTEXT: 100257,
                "<|fim_prefix|>": 100258,
                "<|fim_middle|>": 100259,
                "<|fim_suffix|>": 100260,
                "<|endofprompt|>": 100276,
            },
            eos_token=_ENDOFTEXT,
        ),
    ),
    "o200k_base": KnownVocabulary(
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        199998,
        _O200K_PATTERN,
        SpecialTokens({_ENDOFTEXT: 199999, "<|endofprompt|>": 200018}, eos_token=_ENDOFTEXT),
    ),
}


@dataclass(frozen=True)
class RankFile:
    """What a rank file says.

    Attributes:
        path: Where it is.
        ranks: Token -> rank, every single byte among them.
        known_as: The names in KNOWN whose file it is; more than one if they differ in their special tokens only.
    """

    path: Path
    ranks: dict[bytes, int]
    known_as: list[str]

    def special_tokens(self) -> SpecialTokens | None:
        """Those in tokenizer_config.json beside it, or else of the one known vocabulary that it is; None: unknown.

        ConfigError if tokenizer_config.json cannot be read.
        """
        beside = _special_tokens_beside(self.path)
        if beside is None and len(self.known_as) == 1:
            return KNOWN[self.known_as[0]].special_tokens
        return beside


def find(folder: str, *, key: str) -> Path | None:
    """The only rank file in `folder`: *.tiktoken, tokenizer.model or tiktoken.model, if it looks like one.

    None if there is none; a ConfigError of the field `key` if there are several.
    """
    found = [
        path
        for path in sorted(Path(folder).glob("*"))
        if path.is_file() and (path.suffix == ".tiktoken" or (path.name in _NAMES and _looks_like_one(path)))
    ]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        message = f"more than one tiktoken rank file in {folder} ({names}): name one, or keep one"
        raise ConfigError(Problem(key, message))
    return found[0] if found else None


def read(path: Path, *, key: str) -> RankFile:
    """The content of a rank file; a ConfigError of the field `key` if it is missing or damaged."""

    def damaged(message: str) -> ConfigError:
        return ConfigError(Problem(key, f"not a tiktoken rank file: {message}", str(path)))

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(Problem(key, f"cannot be read: {error.strerror}", str(path))) from error
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}  # rank -> line
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if not match or not token:
            text = line[:40].decode(errors="replace")
            raise damaged(f'line {number} is {text!r}, not "token in base64, space, rank"')
        rank = int(match[2])
        if rank in lines:
            raise damaged(f"lines {lines[rank]} and {number} have the same rank, {rank}")
        if token in ranks:
            raise damaged(f"lines {lines[ranks[token]]} and {number} have the same token, {token!r}")
        ranks[token], lines[rank] = rank, number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise damaged(f"{len(missing)} of the 256 single bytes are not in it (0x{missing[0]:02X} for one)")
    sha256 = hashlib.sha256(content).hexdigest()
    return RankFile(path, ranks, [name for name, known in KNOWN.items() if known.sha256 == sha256])


def vocabulary(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> dict[str, int]:
    """Token -> id as in the tokenizer.json of the same vocabulary, which writes bytes in an alphabet of its own."""
    return {byte_level(token): rank for token, rank in ranks.items()} | dict(special_tokens)


def _looks_like_one(path: Path) -> bool:
    """SentencePiece calls its binary files tokenizer.model, too."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096).rstrip(b"\r\n")) is not None


def _special_tokens_beside(path: Path) -> SpecialTokens | None:
    file = path.with_name("tokenizer_config.json")
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        ids = {token["content"]: int(i) for i, token in content.get("added_tokens_decoder", {}).items()}
        bos, eos = (content.get(name) for name in ("bos_token", "eos_token"))
        texts = [token["content"] if isinstance(token, dict) else token for token in (bos, eos)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"its special tokens cannot be read: {type(error).__name__}: {error}"
        raise ConfigError(Problem(str(file), message)) from error
    return SpecialTokens(ids, *texts) if ids else None
