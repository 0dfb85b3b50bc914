"""Small tokenizers of every kind, trained on the demo's text, and rows of packed documents in them."""

import base64
import functools
import json
import lzma
import random
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
    "Le caf\u00e9 na\u00eff \u2014 \u00ab d\u00e9j\u00e0 vu \u00bb, l'\u00e9t\u00e9. Gr\u00f6\u00dfe, stra\u00dfe; "
    "\u010desk\u00e9 sk\u0142ad.",
    "\u0421\u044a\u0435\u0448\u044c \u0436\u0435 \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f\u0433\u043a"
    "\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431\u0443\u043b\u043e\u043a",
    "\u6211\u80fd\u541e\u4e0b\u73bb\u7483\u800c\u4e0d\u4f24\u8eab\u4f53\u3002\u79c1\u306f\u30ac\u30e9\u30b9\u3092"
    "\u98df\u3079\u3089\u308c\u307e\u3059\u3002\u305d\u308c\u306f\u79c1\u3092\u50b7\u3064\u3051\u307e\u305b\u3093\u3002",
    "\u0915\u094d\u0937 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "smile \U0001f600\U0001f600 family \U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1eb\U0001f1f7 "
    "thumbs \U0001f44d\U0001f3fd ok\U0001f44c",
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
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(), trainer)
    return tokenizer


def _bytes():
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


@functools.cache
def llama2(vocab_size=700):
    """As Llama-2's: BPE with byte fallback over the whole text, in front of which a space is put."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(documents(), trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    model = json.loads(trained.to_str())["model"]
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
    trained.train_from_iterator(documents(), trainers.UnigramTrainer(vocab_size=vocab_size, show_progress=False))
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    vocabulary = [(token, 0.0 if i < 3 else -20.0) for i, token in enumerate(_bytes())] + [(p, s) for p, s in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


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
    "cl100k": lambda: byte_level(900, LLAMA3_PATTERN),
    "NFC": lambda: byte_level(650, LLAMA3_PATTERN, NFC),
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


def row(tokenizer, texts, length, skip, begin=None):
    """(tokens, positions, labels) of `length` tokens of documents packed one after the other, from token `skip` on.

    As torchtitan makes them: a document's last token is a label only, and positions start again with each document.
    `begin`: a token in front of each document; -1, which is no token's id, follows each.
    """
    tokens, positions, labels = [], [], []
    for text in texts:
        ids = [*([] if begin is None else [begin]), *ids_of(tokenizer, text)]
        tokens += ids
        positions += range(len(ids))
        labels += [*ids[1:], -1]
    part = slice(skip, skip + length)
    tokens, positions, labels = tokens[part], positions[part], labels[part]
    cut = next((i for i, position in enumerate(positions) if i > 0 and position == 0), len(positions))
    first = positions[0] if positions else 0
    return tokens, [*(p - first for p in positions[:cut]), *positions[cut:]], labels


def batch(*rows):
    """(input_dict, labels_BL) of rows of one length."""
    tokens, positions, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
    return {"input": tokens, "positions": positions}, labels


def random_rows(tokenizer, texts, length, num_rows, *, seed=0, begin=None):
    """A batch of rows that are cut out of the packed texts at random tokens."""
    rng = random.Random(seed)
    total = sum(len(ids_of(tokenizer, text)) + (begin is not None) for text in texts)
    return batch(*(row(tokenizer, texts, length, rng.randrange(total - length), begin) for _ in range(num_rows)))


def write(tokenizer, folder, *, bos=None, eos=None):
    """Writes tokenizer.json and tokenizer_config.json for torchtitan's reader; returns what that makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    return HuggingFaceTokenizer(tokenizer_path=str(folder))


def rank_lines(ranks):
    """A tiktoken rank file."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def write_ranks(folder, name="demo.tiktoken"):
    """The demo's vocabulary as a rank file: all but the special token, which has id 0, in the order of the merges."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rank_lines({token: i for i, token in enumerate(token_bytes(demo())) if token is not None}))
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
