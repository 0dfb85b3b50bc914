"""Teachers of a chosen size with random weights: for what a teacher costs, its weights do not matter."""

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from let_plugin.preflight.report import Student
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.base import keep_rng_state
from let_plugin.teacher.titan.source import TEACHER_SPECS, register_teacher_spec

_HEAD_WIDTHS = (128, 64, 32, 16)
_FEED_FORWARD = 8 / 3  # widths


@dataclass(frozen=True)
class RandomTeacher:
    """A llama's size.

    Attributes:
        dim: Width.
        num_layers: Number of blocks.
        num_heads: Attention heads.
        hidden_dim: Width of the feed-forward network.
        vocab_size: The student's.
    """

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    vocab_size: int

    @property
    def name(self) -> str:
        """Name of the teacher spec, and of the folder with the weights."""
        shape = f"{self.num_layers}x{self.dim}_heads{self.num_heads}_hidden{self.hidden_dim}_vocab{self.vocab_size}"
        return f"random_llama_{shape}"

    @property
    def num_matmul_params(self) -> int:
        """N_T: parameters of the trunk, embeddings not counted."""
        return _num_params(self.dim, self.num_layers, self.hidden_dim)

    def write(self, folder: Path) -> Path:
        """Writes the weights below `folder` as a DCP checkpoint in bf16, unless they are there.

        Returns:
            The checkpoint's folder.
        """
        path = folder / self.name
        if (path / ".metadata").exists():  # written last
            return path
        spec = self._spec()
        with keep_rng_state(torch.device("cpu")):
            torch.manual_seed(0)
            model: Any = spec.model.build()
            with torch.no_grad():
                model.init_weights(buffer_device=None)
        weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this process is no job: it is not meant to be one
            dcp.save(weights, checkpoint_id=str(path), no_dist=True)
        return path

    def register(self) -> None:
        """Makes `let.teacher.spec = name` mean this teacher, in this process. Safe to call again."""
        if self.name not in TEACHER_SPECS:
            register_teacher_spec(self.name, self._spec)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def _spec(self) -> Any:
        return llama_spec(self.name, **asdict(self))


def of_share(student: Student, share: float, vocab_size: int) -> RandomTeacher:
    """The llama nearest to a share of the student's size, shaped like the student.

    Sizes are those of what is multiplied, N_T and N_S of the FLOP bound N_T / (3 N_S). Among the shapes that come
    within 2 % of the size, or nearest, it is the one whose proportions are most like the student's (width to depth)
    and LLaMA's (feed-forward network 8/3 of the width).

    Args:
        student: What it is to teach.
        share: N_T / N_S, more than 0.
        vocab_size: The student's.
    """
    target = share * student.num_matmul_params
    aspect = student.width / student.num_blocks

    def badness(shape: tuple[int, int, int]) -> tuple[float, float]:
        dim, num_layers, hidden_dim = shape
        miss = abs(math.log(_num_params(dim, num_layers, hidden_dim) / target))
        odd = abs(math.log(dim / num_layers / aspect)) + abs(math.log(hidden_dim / dim / _FEED_FORWARD))
        return max(miss, 0.02), odd

    shapes = [
        (dim, num_layers, hidden_dim)
        for dim in _widths(student.width)
        for num_layers in range(1, student.num_blocks + 1)
        for hidden_dim in _hidden_dims(dim, num_layers, target)
    ]
    dim, num_layers, hidden_dim = min(shapes, key=badness)
    head_width = next(width for width in _HEAD_WIDTHS if dim % width == 0 and (dim > width or width == 16))
    return RandomTeacher(dim, num_layers, dim // head_width, hidden_dim, vocab_size)


def _widths(largest: int) -> list[int]:
    """Widths that hardware likes, up to the student's own (and at least one)."""
    widths = [*range(16, 256, 16), *range(256, 1024, 64), *range(1024, 16385, 128)]
    return [width for width in widths if width <= max(largest, 16)]


def _hidden_dims(dim: int, num_layers: int, target: float) -> list[int]:
    """LLaMA's feed-forward width, and the one that makes the size right, where that is between 1.5 and 4.5 widths."""
    exact = round((target / num_layers - 4 * dim * dim) / (3 * dim) / 16) * 16
    usual = max(round(_FEED_FORWARD * dim / 16) * 16, 16)
    return [usual, exact] if 1.5 * dim <= exact <= 4.5 * dim else [usual]


def _num_params(dim: int, num_layers: int, hidden_dim: int) -> int:
    return num_layers * (4 * dim * dim + 3 * dim * hidden_dim + 2 * dim) + dim
