"""Teachers of a chosen size with random weights: for what a teacher costs, its weights do not matter."""

import math
from pathlib import Path
from typing import Any, cast

import torch

from let_plugin.bench import export_hf
from let_plugin.preflight.report import Student
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.base import keep_rng_state


def shape(student: Student, share: float) -> dict[str, int]:
    """A llama of a share of the student's size: its depth and width scaled by one factor.

    `share` is N_T / N_S of the FLOP bound. The feed-forward network's width makes up for what rounding has changed.
    """
    target = share * student.num_matmul_params
    # A block has about 12 width^2 parameters.
    factor = (target / (12 * student.num_blocks * student.width**2)) ** (1 / 3)
    num_layers = max(1, round(factor * student.num_blocks))
    dim = max(16, 16 * round(math.sqrt(target / (12 * num_layers)) / 16))
    if dim > 256:
        dim = 64 * round(dim / 64)
    hidden_dim = max(16, 16 * round((target / num_layers - 4 * dim * dim) / (3 * dim) / 16))
    head_width = next(width for width in (128, 64, 32, 16) if dim % width == 0 and (dim > width or width == 16))
    return {"dim": dim, "num_layers": num_layers, "num_heads": dim // head_width, "hidden_dim": hidden_dim}


def write(size: dict[str, int], vocab_size: int, folder: Path) -> Path:
    """The folder, below `folder`, of a teacher of a `shape` in Hugging Face's format and bf16; written if missing."""
    name = "x".join(map(str, [*size.values(), vocab_size]))
    path = folder / f"random_llama_{name}"
    if (path / export_hf.WEIGHTS).exists():  # written last
        return path
    spec = llama_spec(path.name, vocab_size=vocab_size, tie_embeddings=True, **cast(Any, size))
    with keep_rng_state(torch.device("cpu")):
        torch.manual_seed(0)
        model: Any = spec.model.build()
        with torch.no_grad():
            model.init_weights(buffer_device=None)
    export_hf.write(spec, {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, path)
    return path
