"""What the rest of the plugin knows about a teacher, whichever library builds it.

Shape legend: B batch, L sequence, E teacher width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What is known of a teacher before its weights are read.

    Attributes:
        description: One line for people: family, format, where it is.
        hidden_size: Width E of its last hidden state.
        num_layers: Number of transformer blocks.
        vocab_size: Rows of its token embedding.
        max_seq_len: Longest sequence that it was built for, in tokens; None if it has no limit of its own.
        num_trunk_params: Parameters of everything but the language-model head, embeddings included.
        num_embedding_params: Those of the token (and position) embeddings alone: looked up, not multiplied.
    """

    description: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_seq_len: int | None
    num_trunk_params: int
    num_embedding_params: int


class Teacher(nn.Module, ABC):
    """A frozen trunk in eval mode: token ids in, last hidden state (after the final norm) out.

    It is never a submodule of the student, has no language-model head, and no parameter of it requires a gradient.
    """

    @abstractmethod
    def forward(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
        """Returns the last hidden state, [B, L, E], in the teacher's dtype.

        Args:
            tokens_BL: Token ids, int64.
            positions_BL: Position of each token within its own document, int64: 0 starts a document, and no token
                sees another document's. None: one document per row.
        """


class TeacherSource(ABC):
    """A teacher that has been found and understood, but not loaded yet.

    Making one reads configuration files only, and raises ConfigError for what is wrong with them.
    """

    info: TeacherInfo

    @abstractmethod
    def vocabulary(self) -> dict[str, int] | None:
        """Token -> id of the teacher's tokenizer, special tokens included; None if it comes without one."""

    @abstractmethod
    def build(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: "Trainer.Config",
        parallel_dims: "ParallelDims",
    ) -> Teacher:
        """Loads the teacher onto `device`, sharded with FSDP2 over the "fsdp" axis of its device meshes.

        Leaves the random number generators as they were. ConfigError for a file that is missing, truncated, or does
        not hold the weights that the configuration asks for.

        Args:
            dtype: Data type of its weights and maths.
            device: This rank's device.
            config: The student's configuration, for parallelism, compilation and sequence length.
            parallel_dims: The teacher's device meshes: `sharding.teacher_parallel_dims`.
        """


def freeze(model: nn.Module) -> None:
    """Turns off gradients and everything stochastic (dropout): eval mode, and requires_grad False throughout."""
    model.requires_grad_(False)
    model.eval()


@contextmanager
def keep_rng_state(device: torch.device) -> Iterator[None]:
    """Restores the random number generators of the CPU and of `device` on leaving."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        index = device.index if device.index is not None else torch.accelerator.current_device_index()
        with torch.random.fork_rng(devices=[index], device_type=device.type):
            yield
