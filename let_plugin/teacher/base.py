"""What the rest of the plugin knows about a teacher, whichever library builds it.

Shape legend: B batch (this rank's rows), L sequence, V vocabulary, E teacher width: the sum over the layers that are
asked for.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime.batch_extras import MakeExtras

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer

# Name of a range in a profile: what a native teacher makes of the documents' positions, if not the student's masks.
MASK_RANGE = "let: mask"

# A whole, frozen model: tokens and positions as in Teacher.forward -> logits [B, L, V] in its dtype.
LanguageModel = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What is known of a teacher before its weights are read."""

    description: str  # one line for people: family, format, where it is
    hidden_size: int  # width of its last hidden state, after the final norm
    num_layers: int  # transformer blocks
    vocab_size: int  # rows of its token embedding
    max_seq_len: int | None  # longest sequence that it was built for, in tokens; None: it has no limit of its own
    num_trunk_params: int  # of everything but the language-model head, embeddings included
    num_embedding_params: int  # of the token (and position) embeddings alone: looked up, not multiplied
    block_params: tuple[int, ...]  # parameters of each block
    residual_size: int | None = None  # width of its residual stream, if it differs: OPT-350m projects its last state
    num_heads: int | None = None  # attention heads of a block; None: not known
    num_kv_heads: int | None = None
    is_native: bool = False  # whether torchtitan runs it

    @property
    def num_language_model_params(self) -> int:
        """Parameters that the whole model multiplies: the trunk without what is looked up, and the head."""
        return self.num_trunk_params - self.num_embedding_params + self.vocab_size * self.hidden_size

    def num_params_to(self, layers: Sequence[int | str]) -> int:
        """Parameters of the trunk, final norm included, without the blocks that are not needed for these layers."""
        return self.num_trunk_params - sum(self.block_params[num_blocks_to(layers) :])

    def width(self, layer: int | str, final_norm: bool) -> int:
        """Width of a layer's state; `final_norm`: whether that of the last block is taken after the final norm."""
        if self.residual_size is None or (final_norm and layer == self.num_layers - 1):
            return self.hidden_size
        return self.residual_size


class Teacher(nn.Module, ABC):
    """A frozen trunk in eval mode: token ids in, states of the layers that it was built for out.

    It ends at the deepest of them. It is never a submodule of the student, has no language-model head, and no
    parameter of it requires a gradient.
    """

    @abstractmethod
    def forward(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None, masks: Any = None) -> torch.Tensor:
        """The layers' states, concatenated along channels, [B, L, E], in the teacher's dtype.

        Args:
            tokens_BL: Token ids, int64.
            positions_BL: Position of each token within its own document, int64: 0 starts a document, and no token
                sees another document's. None: one document per row.
            masks: What torchtitan has made of the same positions for the student, if anything. A teacher that
                would make the same attention masks takes these.
        """


class TeacherSource(ABC):
    """A teacher that has been found and understood, but not loaded yet.

    Making one reads configuration files and the headers of weight files; ConfigError says what is wrong with them.
    """

    info: TeacherInfo

    @abstractmethod
    def tokenizer(self) -> Any | None:
        """Of torchtitan's or `transformers`' kind; None if the teacher comes without one."""

    def vocabulary(self) -> dict[str, int] | None:
        """Token -> id, special tokens included; None if the teacher comes without a tokenizer."""
        tokenizer = self.tokenizer()
        return None if tokenizer is None else tokenizer.get_vocab()

    @abstractmethod
    def build(
        self, config: "Trainer.Config", device: torch.device, parallel_dims: "ParallelDims", layers: Sequence[int | str]
    ) -> Teacher:
        """Loads the teacher onto `device`, sharded with FSDP2 over the "fsdp" axis of its device meshes.

        Leaves the random number generators as they were. ConfigError for weights that cannot be read or are not finite.

        Args:
            config: The student's, for parallelism, compilation, sequence length, and the teacher's dtype. Whether the
                last block's state is taken after the final norm is `let.teacher.final_norm`.
            device: This rank's.
            parallel_dims: The teacher's device meshes: `sharding.teacher_parallel_dims`.
            layers: Whose states it returns, in this order, distinct, at least one: numbers of blocks (the residual
                stream behind block 0, 1, ...) or EMBEDDING (what enters block 0). Blocks behind the deepest do not
                exist in the teacher.
        """

    @abstractmethod
    def language_model(self, *, dtype: torch.dtype, device: torch.device, seq_len: int) -> LanguageModel:
        """Loads the whole model, with its head, onto `device`: to measure its loss, not to teach.

        In every process that calls it. `seq_len`: of the longest row that it will be given, in tokens. The rest is as
        in `build`; ConfigError also if there is no head.
        """

    @abstractmethod
    def outer_layers(self, *, head: bool) -> dict[str, torch.Tensor]:
        """Reads "embeddings", those of its tokens, and with `head` also "head": its weight times the final norm's.

        [V, E], fp32, in CPU memory, in the process that calls it alone. ConfigError as for `build`, if there is no
        head, or if the family does more than these layers say: see `outer_layers.py`.
        """

    @abstractmethod
    def head(self) -> dict[str, torch.Tensor]:
        """Reads the map from its last state, after the final norm, to its logits: "weight" [V, E], perhaps "bias" [V].

        fp32, in CPU memory, in the process that calls it alone. ConfigError as for `build`, if there is no head, or if
        the family makes logits in another way: scales or caps them, say.
        """


class States(NamedTuple):
    """The teacher's states of the student's tokens."""

    states_BLE: torch.Tensor  # in the teacher's dtype; arbitrary values for a token that has no state
    known_BL: torch.Tensor | None  # which tokens have one, bool; None: all
    num_tokens: int  # on how many tokens the teacher has run


class StateProvider(ABC):
    """Makes or reads the states of a batch."""

    make_extras: MakeExtras | None = None  # what the data loader is to add to each batch for it
    teacher: Teacher | None = None  # if there is one in this process

    def start_step(self, step: int) -> None:  # noqa: B027
        """Before the first microbatch of step `step` (0-based)."""

    @abstractmethod
    def states(self, batch: Mapping[str, torch.Tensor], student_masks: Any = None) -> States:
        """The states of all tokens of "input"; `student_masks` as in Teacher.forward.

        `batch` has "input", token ids [B, L]; for packed documents "positions" [B, L]; and what `make_extras` has
        added. On the device; whole sequences; only the rows of this rank's share.
        """


class OnlineStates(StateProvider):
    """The teacher runs on the student's tokens."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher: Teacher = teacher

    def states(self, batch: Mapping[str, torch.Tensor], student_masks: Any = None) -> States:
        tokens_BL = batch["input"]
        return States(self.teacher(tokens_BL, batch.get("positions"), student_masks), None, tokens_BL.numel())


def num_blocks_to(layers: Sequence[int | str]) -> int:
    """How many blocks run for these layers: up to the deepest. For the embedding alone it is one, which shows it."""
    return max((layer for layer in layers if isinstance(layer, int)), default=0) + 1


def freeze(model: nn.Module) -> None:
    """Turns off gradients and everything stochastic (dropout)."""
    model.requires_grad_(False)
    model.eval()


def keep_rng_state(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random number generators of the CPU and of `device` on leaving."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def may_be_on_hub(path: str) -> bool:
    """Whether it looks like a hub name ("org/name"), and there is no such path on this machine."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not os.path.exists(path)


def bad_path(path: str, *messages: str) -> ConfigError:
    """What is wrong with the teacher that `let.teacher.path` names."""
    return ConfigError([Problem("let.teacher.path", message, path) for message in messages])


def require(*packages: str) -> None:
    """ConfigError if one of these optional packages is not installed."""
    for package in packages:
        if find_spec(package) is None:
            message = f"this teacher needs the {package} package: pip install let-plugin[hf]"
            raise ConfigError(Problem("let.teacher.path", message))
