"""Writes .gguf files of small Llamas, without a tokenizer."""

from pathlib import Path

import numpy as np


def write_llama(
    file: Path,
    *,
    num_blocks: int = 1,
    width: int = 8,
    hidden: int = 16,
    vocab_size: int = 32,
    quantization: str = "F32",
    **changed: np.ndarray | None,
) -> str:
    """Writes one whose weights are all 1.

    Args:
        file: Where to.
        num_blocks: Its blocks, of two heads.
        width: Of its residual stream.
        hidden: Of its feed-forward networks.
        vocab_size: Rows of its embedding.
        quantization: Of its matrices, by gguf's name.
        **changed: Tensors instead, "blk_0_attn_q" for instance, not quantized; None leaves one out.

    Returns:
        The file.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(num_blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab_size)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab_size, width), "output_norm": (width,)}
    for i in range(num_blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}"] = (width, width)
        shapes |= {f"blk.{i}.{name}": (hidden, width) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (width, hidden)}
        shapes |= {f"blk.{i}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    kind = GGMLQuantizationType[quantization]
    for name, shape in shapes.items():
        weights = changed.get(name.replace(".", "_"))
        if weights is None and name.replace(".", "_") in changed:
            continue
        if weights is None and len(shape) == 2 and quantization != "F32":
            writer.add_tensor(f"{name}.weight", quants.quantize(np.ones(shape, np.float32), kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32) if weights is None else weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)
