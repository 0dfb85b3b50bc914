"""Writes .gguf files of small Llamas, with the demo's tokenizer."""

import json
from pathlib import Path

import numpy as np

from let_plugin.demo import TOKENIZER


def write_llama(file: Path, *, width: int = 8, hidden: int = 16, more: str = "", **changed: np.ndarray | None):
    """Writes one with random weights, one block of two heads and a vocabulary of 32; returns the path.

    `changed` has tensors that take the place of others, "blk_0_attn_q" for instance; None leaves one out. `more`: one
    more tensor, or field.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    tokenizer = json.loads(Path(TOKENIZER, "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (32, width), "output_norm": (width,)}
    shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (hidden, width), "blk.0.ffn_up": (hidden, width), "blk.0.ffn_down": (width, hidden)}
    shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        weights = changed.get(name.replace(".", "_"), generator.normal(0, 0.3, shape).astype(np.float32))
        if weights is not None:
            writer.add_tensor(f"{name}.weight", weights)
    if more:
        add = writer.add_string if more.endswith("type") else writer.add_tensor
        add(more, "linear" if more.endswith("type") else np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)
