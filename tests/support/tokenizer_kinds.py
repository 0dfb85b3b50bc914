"""Small tokenizers of every kind, trained on the demo's text, and rows of packed documents in them."""

import base64
import functools
import json
import lzma
from pathlib import Path

import tiktoken
import torch
from tiktoken_ext import openai_public
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.demo import TEXT, TOKENIZER
from let_plugin.tokens.tiktoken import LLAMA3_PATTERN
from let_plugin.tokens.token_bytes import token_bytes

SPACE = "\u2581"
SMOLLM2 = Path(__file__).parents[2] / "assets/smollm2"
EOS = "<|endoftext|>"
GPT2_PATTERN = openai_public.r50k_pat_str
MULTILINGUAL = [
    "The year 1999, and 12345678 more: 3.14159.\n\n\n   Three spaces, \ttabs\t\t and a line.\r\nEnd of it...  ",
    "Le café naïf — « déjà vu », l'été. Größe, straße; české skład.",
    "Съешь же ещё этих мягких французских булок",
    "我能吞下玻璃而不伤身体。私はガラスを食べられます。それは私を傷つけません。",
    "क्ष हिन्दी ภาษาไทย العربية עברית",
    "smile 😀😀 family 👨\u200d👩\u200d👧 flag 🇫🇷 thumbs 👍🏽 ok👌",
    "def f(x):\n    if x:\n        return {'a': [1, 22, 333]}\n\n\n\tpass  # done\n",
    "He said \"it's 'fine'\", didn't he? <s>struck</s> a_b-c/d@e.org $5 50% #tag (x) [y] {z}",
]


@functools.cache
def documents(num=200):
    with lzma.open(TEXT["train"], "rt") as file:
        return [json.loads(next(file))["text"] for _ in range(num)]


@functools.cache
def byte_level(vocab_size=700, pattern=GPT2_PATTERN, normalizer=None):
    """Byte-level BPE of the pieces that a regular expression cuts text into."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special, initial = ["<|begin|>", "<|end|>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    _train(tokenizer, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=initial))
    return tokenizer


def _train(tokenizer, trainer):
    """The model of the trained tokenizer, as JSON has it."""
    trainer.show_progress = False
    tokenizer.train_from_iterator(documents(), trainer)
    return json.loads(tokenizer.to_str())["model"]


def _bytes():
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


@functools.cache
def llama2(vocab_size=700):
    """As Llama-2's: BPE with byte fallback over the whole text, in front of which a space is put."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    model = _train(trained, trainers.BpeTrainer(vocab_size=vocab_size))
    vocabulary = {token: i for i, token in enumerate([*_bytes(), *model["vocab"], SPACE * 2, SPACE * 4])}
    merges = [*map(tuple, model["merges"]), (SPACE, SPACE), (SPACE * 2, SPACE * 2)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@functools.cache
def metaspace(vocab_size=500, prepend_scheme="always"):
    """As SentencePiece makes it: Unigram with byte fallback."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = _train(trained, trainers.UnigramTrainer(vocab_size=vocab_size))["vocab"]
    vocabulary = [(token, 0.0 if i < 3 else -20.0) for i, token in enumerate(_bytes())] + [(p, s) for p, s in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@functools.cache
def demo():
    return Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")


@functools.cache
def encoding():
    """A tiktoken vocabulary."""
    values = [value for value in token_bytes(byte_level(600)) if value is not None]
    special = {"<|begin|>": len(values), "<|end|>": len(values) + 1}
    ranks = {value: i for i, value in enumerate(values)}
    return tiktoken.Encoding("small", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


NFC = normalizers.NFC()
KINDS = {
    "demo": demo,
    "byte-level": byte_level,
    "NFC": lambda: byte_level(900, LLAMA3_PATTERN, NFC),
    "Llama-2": llama2,
    "Unigram": metaspace,
    "Metaspace first": lambda: metaspace(400, "first"),
    "tiktoken": encoding,
}


def ids_of(tokenizer, text):
    """Of a whole document, without special tokens, whatever it looks like."""
    if isinstance(tokenizer, tiktoken.Encoding):
        return tokenizer.encode_ordinary(text)
    return tokenizer.encode(text, add_special_tokens=False).ids


def row(tokenizer, texts, length, skip):
    """(tokens, positions, labels) of `length` tokens of documents packed one after the other, from token `skip` on.

    As torchtitan makes them: a document's last token is a label only, and positions start again with each document.
    -1, which is no token's id, follows each.
    """
    tokens, positions, labels = [], [], []
    for ids in (ids_of(tokenizer, text) for text in texts):
        tokens += ids
        positions += range(len(ids))
        labels += [*ids[1:], -1]
    part = slice(skip, skip + length)
    tokens, positions, labels = tokens[part], positions[part], labels[part]
    cut = next((i for i, position in enumerate(positions) if i > 0 and position == 0), len(positions))
    return tokens, [*range(cut), *positions[cut:]], labels


def batch(*rows):
    """(input_dict, labels_BL) of rows of one length."""
    tokens, positions, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
    return {"input": tokens, "positions": positions}, labels


def write(tokenizer, folder, *, bos=None, eos=None):
    """Writes tokenizer.json and tokenizer_config.json for torchtitan's reader; returns what that makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    return HuggingFaceTokenizer(tokenizer_path=str(folder))


def write_ranks(folder, name):
    """The demo's vocabulary as a rank file: all but the special token, which has id 0, in the order of the merges."""
    ranks = {token: rank for rank, token in enumerate(token_bytes(demo())) if token is not None}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path = Path(folder, name)
    path.write_text("".join(lines))
    return path


def write_for_teacher(folder, config, teacher_seq_len):
    """Gives the teacher of a tiny configuration (a TOML file) another tokenizer, and returns it."""
    tokenizer = write(metaspace(), folder, bos="<s>", eos="</s>")
    alignment = f"token_alignment = {{enable = true, teacher_seq_len = {teacher_seq_len}}}"
    own = f'"{Path(TOKENIZER).relative_to(Path(__file__).parents[2])}"'
    text = config.read_text()
    assert own in text
    config.write_text(text.replace("[let]\n", f"[let]\n{alignment}\n").replace(own, f'"{folder}"'))
    return tokenizer
