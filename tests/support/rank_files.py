"""tiktoken rank files, made of the demo's tokenizer."""

import base64
from pathlib import Path

from tiktoken_ext import openai_public
from tokenizers import Tokenizer

from let_plugin.demo import TOKENIZER
from let_plugin.tokens.token_bytes import token_bytes

EOS = "<|endoftext|>"
GPT2_PATTERN = openai_public.r50k_pat_str


def demo_tokenizer():
    return Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")


def lines_of(ranks):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def demo_ranks():
    """Its tokens but for the special one, which has id 0: the ids are in the order of the merges."""
    return {token: i for i, token in enumerate(token_bytes(demo_tokenizer())) if token is not None}


def write_demo(folder, name="demo.tiktoken"):
    """The demo's vocabulary as a rank file in `folder`."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines_of(demo_ranks()))
    return path
