"""tiktoken rank files, made of the demo's tokenizer."""

import base64
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from let_plugin.demo import TOKENIZER
from let_plugin.tokens.token_bytes import token_bytes

EOS = "<|endoftext|>"


def demo_tokenizer():
    return Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")


def lines_of(ranks):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def demo_ranks():
    """Its tokens but for the special one, which has id 0: the ids are in the order of the merges."""
    return {token: i for i, token in enumerate(token_bytes(demo_tokenizer())) if token is not None}


def write_demo(folder, name="demo.tiktoken", *, tell_special_tokens=False):
    """The demo's vocabulary as a rank file in `folder`, alone, or with a tokenizer_config.json that goes with it."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines_of(demo_ranks()))
    if tell_special_tokens:
        config = {
            "added_tokens_decoder": {"0": {"content": EOS, "special": True}},
            "bos_token": EOS,
            "eos_token": {"content": EOS},
        }
        path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    return path


def write_small(folder, size=1000):
    """The first tokens of the demo's vocabulary alone: a tokenizer that cuts text finer.

    `folder`/ranks has a rank file and nothing else, `folder`/json the tokenizer.json of the same vocabulary.
    """
    (folder / "ranks").mkdir(parents=True)
    (folder / "json").mkdir()
    ranks = {token: rank for token, rank in demo_ranks().items() if rank < size}
    (folder / "ranks/small.tiktoken").write_text(lines_of(ranks))
    content = json.loads(Path(TOKENIZER, "tokenizer.json").read_text())
    vocabulary = {token: i for token, i in content["model"]["vocab"].items() if i < size}
    merges = [pair for pair in content["model"]["merges"] if "".join(pair) in vocabulary]
    content["model"] |= {"vocab": vocabulary, "merges": merges}
    (folder / "json/tokenizer.json").write_text(json.dumps(content))
    shutil.copy(f"{TOKENIZER}/tokenizer_config.json", folder / "json")
