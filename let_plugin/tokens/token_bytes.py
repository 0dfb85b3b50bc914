"""The bytes of text that each token of a tokenizer stands for.

It is what different tokenizers have in common: the bytes of a text's tokens, one after the other, are the text.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiktoken import Encoding
from tokenizers import Tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in the vocabularies of byte-level BPE (GPT-2).

    The 188 printable characters of Latin-1 stand for themselves, those from U+0100 on for the other bytes in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


def byte_level(token: bytes) -> str:
    """A token as byte-level BPE writes it in its vocabulary: a space is U+0120."""
    return "".join(_CHARACTERS[byte] for byte in token)


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """By id, the bytes of text that each token stands for, in UTF-8, of which a token may hold a part.

    None: a special token (control tokens, and what stands for unknown text), or an id that there is not. An added token
    that is not special stands for its own text. Added tokens apart, the bytes of `encode(text)` are those of `text`,
    but for what the tokenizer itself does to a text before it looks for tokens:

    * a space that it puts in front;
    * in vocabularies that write a space as U+2581, a U+2581 of the text becomes a space;
    * a normalizer (NFC in Qwen2's) and a lossy split (T5's of runs of spaces): the bytes are those of their result;
    * unknown text, in a vocabulary without bytes.

    It takes a `tokenizers.Tokenizer`, tiktoken's `Encoding`, or what has one: torchtitan's HuggingFaceTokenizer and
    TikTokenTokenizer as `.tokenizer`, a fast tokenizer of `transformers` as `.backend_tokenizer`. ValueError for any
    other, or if its tokens do not say which bytes they stand for (WordPiece, WordLevel).
    """
    tokenizer = unwrapped(tokenizer)
    return _of_encoding(tokenizer) if isinstance(tokenizer, Encoding) else _of_tokenizer(tokenizer)


def unwrapped(tokenizer: Any) -> Encoding | Tokenizer:
    """The library's own tokenizer in one of torchtitan's or `transformers`'. ValueError if it is of no known kind.

    torchtitan adds all that tokenizer_config.json lists as special tokens; here those are special that it calls so.
    """
    listed: dict[str, Any] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        settings = Path(tokenizer.tokenizer_path, "tokenizer_config.json")
        listed = json.loads(settings.read_text()).get("added_tokens_decoder", {}) if settings.is_file() else {}
    ordinary = {token.get("content") for token in listed.values() if not token.get("special", True)}
    for name in ("tokenizer", "backend_tokenizer"):
        tokenizer = getattr(tokenizer, name, tokenizer)
    if not isinstance(tokenizer, Encoding | Tokenizer):
        raise ValueError(f"no way is known to the bytes of the tokens of a {type(tokenizer).__qualname__}")
    if ordinary and isinstance(tokenizer, Tokenizer):
        state = json.loads(tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in ordinary
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def _of_encoding(encoding: Encoding) -> list[bytes | None]:
    result: list[bytes | None] = [None] * (encoding.max_token_value + 1)
    for value in encoding.token_byte_values():
        result[encoding.encode_single_token(value)] = value
    return result


def _of_tokenizer(tokenizer: Tokenizer) -> list[bytes | None]:
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    components = [part for name in ("decoder", "pre_tokenizer", "normalizer") for part in parts(state[name])]
    types = {part["type"] for part in components}
    space = next(filter(None, map(_space_symbol, components)), None)
    has_bytes = model.get("byte_fallback") or "ByteFallback" in types

    def of_byte_level(token: str) -> bytes:
        # A token with other characters than the alphabet's comes from no text; decoders take it for its own.
        return bytes(_BYTES[c] for c in token) if all(c in _BYTES for c in token) else token.encode()

    def of_pieces(token: str) -> bytes:
        if has_bytes and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        assert space is not None
        return token.replace(space, " ").encode()

    kind = model["type"]
    if kind in ("BPE", "Unigram") and "ByteLevel" in types:
        convert = of_byte_level
    elif kind in ("BPE", "Unigram") and space is not None:
        convert = of_pieces
    else:
        raise ValueError(
            f"the tokens of this tokenizer ({kind}) do not say which bytes they stand for; it takes byte-level BPE, or "
            "BPE or Unigram that writes spaces as U+2581 (SentencePiece)"
        )

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    result: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        result[i] = convert(token)
    unknown = model["unk_id"] if kind == "Unigram" else vocabulary.get(model["unk_token"])
    if unknown is not None:
        result[unknown] = None
    for i, added in tokenizer.get_added_tokens_decoder().items():
        result[i] = None if added.special else added.content.encode()
    return result


def parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer's JSON and, if it is a sequence, what that consists of."""
    if component is not None:
        yield component
        for name in ("decoders", "pretokenizers", "normalizers"):
            for part in component.get(name, []):
                yield from parts(part)


def _space_symbol(part: dict[str, Any]) -> str | None:
    """What stands for a space in the vocabulary, if this component of the tokenizer says it."""
    if part["type"] == "Metaspace":
        return part["replacement"]
    if part["type"] == "Replace":
        pattern, content = part["pattern"].get("String", ""), part["content"]
        if " " in (pattern, content):
            symbol = (pattern + content).strip()  # of the normalizer, or of the decoder, which goes back
            return symbol if len(symbol) == 1 else None
    return None
