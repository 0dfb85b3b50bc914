"""The weights of a torchtitan model: a torchtitan checkpoint (DCP), Hugging Face safetensors or a .gguf file.

What the files say of themselves is compared with the model before anything is built; then each rank reads its shards.
(GGUF is read by one rank: see `sharding.read_once`.)
"""

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_spec import ModelSpec

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import dcp_files
from let_plugin.teacher.base import bad_path
from let_plugin.teacher.hf.files import StoredTensor, check_finite, linked, read_headers, some_names, weight_files
from let_plugin.teacher.sharding import hand_out, raise_together, read_once

if TYPE_CHECKING:
    from let_plugin.teacher.hf.checkpoint import Checkpoint

_BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_KINDS = {True: "floating-point numbers", False: "integers"}


class TitanWeights:
    """The weights of a torchtitan model in the folder `path`, not read yet. ConfigError if there are none.

    `spec` is the model, called `name` in messages, and `checkpoint` what it was made from, if it was; that has been
    checked already. `format` is "DCP", "safetensors" or "GGUF".
    """

    def __init__(self, path: str, spec: ModelSpec, name: str, checkpoint: "Checkpoint | None" = None) -> None:
        self._path = path
        self._spec = spec
        self._name = name
        self._checkpoint = checkpoint
        if checkpoint is None:
            self.format = _weights_format(path, spec)
        else:
            self.format = "GGUF" if checkpoint.is_gguf else "safetensors"

    def check(self, trunk: nn.Module, num_blocks: int) -> None:
        """Compares what the files say of themselves with a whole trunk on the meta device; reads no weights.

        ConfigError names the tensors which are missing, of another shape or kind of data type, in a file that is
        missing or truncated, or in blocks of which the model knows nothing. What is no part of a block (a head, an
        optimizer's state) may be left over.
        """
        wanted = trunk.state_dict()
        try:
            if self.format == "DCP":
                described = dcp_files.open_checkpoint(self._path).read_metadata()
                stored = {
                    name: StoredTensor(tuple(tensor.size), tensor.properties.dtype.is_floating_point)
                    for name, tensor in described.state_dict_metadata.items()
                    if isinstance(tensor, TensorStorageMetadata)
                }
                messages = _differences(stored, wanted, num_blocks)
                if cut := dcp_files.incomplete(described, stored.keys() & wanted.keys(), Path(self._path)):
                    names = some_names(f"{name} ({what})" for name, what in cut.items())
                    messages.append(f"tensors that are not wholly there: {names}; fetch the files again")
            else:
                stored = read_headers(weight_files(Path(self._path), any_name=True))
                messages = _differences(stored, self._adapter().to_hf(wanted), num_blocks)
        except ConfigError:
            raise
        except Exception as error:  # whatever a reader stumbles over, it is the file's
            raise self._unfit(error) from error
        if messages:
            raise bad_path(self._path, *messages)

    def load(self, model: Any, dtype: torch.dtype, parallel_dims: ParallelDims | None = None) -> None:
        """Reads this rank's own shards into `model`. Collective over the ranks that share it, if there are several.

        ConfigError, on all of these ranks, for files that have become others since `check`, or tensors that hold NaN or
        infinities.
        """
        dims = parallel_dims or ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
        state_dict = model.state_dict()
        if model.enable_weight_tying:
            state_dict.pop("lm_head.weight", None)  # one tensor with the embedding
        if self.format == "GGUF":
            tensors, _ = read_once(lambda: self._read_gguf(dtype, head=model.lm_head is not None), dims)
            hand_out(tensors, state_dict.items(), dims)
        else:
            raise_together(self._read(state_dict), dims)
        model.load_state_dict(state_dict, strict=not model.enable_weight_tying)

    def _read(self, state_dict: dict[str, Any]) -> list[Problem]:
        """Reads this rank's shards into `state_dict`. No collective: ranks without a teacher need not take part."""
        try:
            if self.format == "DCP":
                dcp_files.load(state_dict, dcp_files.open_checkpoint(self._path))
            else:
                adapter = self._adapter()
                hf_state_dict = adapter.to_hf(state_dict)
                files = weight_files(Path(self._checkpoint.folder if self._checkpoint else self._path), any_name=True)
                with linked(files) as folder:  # torch's reader takes all that lie side by side
                    dcp_files.load(hf_state_dict, adapter.get_hf_storage_reader(folder))
                read = adapter.from_hf(hf_state_dict)
                state_dict |= {name: read[name] for name in state_dict}
            check_finite(state_dict, self._path)
        except ConfigError as error:
            return error.problems
        except Exception as error:
            return self._unfit(error).problems
        return []

    def _read_gguf(self, dtype: torch.dtype, *, head: bool) -> dict[str, torch.Tensor]:
        assert self._checkpoint is not None
        prefix = "" if head else "model."
        weights = self._checkpoint.load(dtype, head=head).state_dict()
        return self._adapter().from_hf({f"{prefix}{name}": tensor for name, tensor in weights.items()})

    def _adapter(self) -> Any:
        assert self._spec.state_dict_adapter is not None
        config: Any = copy.copy(self._spec.model)
        config.enable_weight_tying = False  # a tied head is the embedding, and no part of what is read
        return self._spec.state_dict_adapter(config, None)

    def _unfit(self, error: Exception) -> ConfigError:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return bad_path(self._path, f"the weights do not fit the spec {self._name!r} or cannot be read: {cause}")


def _weights_format(path: str, spec: ModelSpec) -> str:
    files = os.listdir(path) if os.path.isdir(path) else []
    if ".metadata" in files:
        return "DCP"
    if not any(f.endswith((".safetensors", ".safetensors.index.json")) for f in files):
        message = "no such folder with a torchtitan checkpoint (DCP) or *.safetensors"
    elif spec.state_dict_adapter is None:
        message = f"{spec.name} has no adapter for Hugging Face weights; give a torchtitan checkpoint (DCP)"
    else:
        return "safetensors"
    raise bad_path(path, message)


def _differences(stored: Mapping[str, StoredTensor], wanted: Mapping[str, torch.Tensor], num_blocks: int) -> list[str]:
    """What is wrong with the tensors of a checkpoint, `wanted` being those of a model of `num_blocks`."""
    missing = wanted.keys() - stored.keys()
    mismatched = []
    for name in wanted.keys() - missing:
        (shape, is_floating), tensor = stored[name], wanted[name]
        if shape != tensor.shape:
            mismatched.append(f"{name} (file {shape}, spec {tuple(tensor.shape)})")
        elif is_floating != tensor.is_floating_point():
            mismatched.append(f"{name} (file {_KINDS[is_floating]}, spec {_KINDS[not is_floating]})")
    messages = []
    if missing:
        messages.append(f"the checkpoint lacks tensors that the spec asks for: {some_names(missing)}")
    if mismatched:
        messages.append(f"tensors that are not as the spec says: {some_names(mismatched)}")
    # Tensors of blocks would silently be left out: a deeper model's weights would load into its lower blocks, those of
    # one with biases would lose them. Old checkpoints hold the rotary frequencies, which follow from the configuration.
    blocks = {name: int(match[1]) for name in stored if (match := _BLOCK.match(name))}
    depth = max(blocks.values(), default=-1) + 1
    surplus = [name for name in blocks.keys() - wanted.keys() if not name.endswith("rotary_emb.inv_freq")]
    if depth > num_blocks:
        messages.append(f"the checkpoint has {depth} blocks, the spec {num_blocks}")
    elif surplus:
        messages.append(f"the checkpoint has tensors that the spec knows nothing of: {some_names(surplus)}")
    return messages
