"""The weights of a torchtitan model in a folder: a torchtitan checkpoint (DCP), or Hugging Face safetensors.

What the files say of themselves is compared with the model before anything is built; then each rank reads its shards.
"""

import copy
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torchtitan.protocols.model_spec import ModelSpec

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import dcp_files
from let_plugin.teacher.hf.safetensors_files import pieces, read_headers, some_names

_PATH_KEY = "let.teacher.path"
_BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.")


class TitanWeights:
    """The weights of a torchtitan model, not read yet.

    Args:
        path: The folder.
        spec: The model; its adapter translates safetensors.
        name: Of the specification, for messages.

    Attributes:
        format: "DCP" or "safetensors".

    Raises:
        ConfigError: If the folder is not there, or holds neither.
    """

    def __init__(self, path: str, spec: ModelSpec, name: str) -> None:
        self.format = _weights_format(path, spec)
        self._path = path
        self._spec = spec
        self._name = name
        self._in_parts = False  # whether they can be read block by block

    def check(self, trunk: nn.Module, num_blocks: int) -> None:
        """Compares what the files say of themselves with a whole trunk on the meta device; reads no weights.

        A head, and what else is no part of a block (an optimizer's state), may be left over.

        Raises:
            ConfigError: That names the tensors which are missing, of another shape or kind of data type, in a file
                that is missing or truncated, or in blocks of which the model knows nothing.
        """
        wanted = trunk.state_dict()
        try:
            if self.format == "DCP":
                described = dcp_files.open_checkpoint(self._path).read_metadata()
            else:
                read_headers(Path(self._path), every_file=True)
                adapter = self._adapter(None)
                wanted = adapter.to_hf(wanted)
                described = adapter.get_hf_storage_reader(self._path).read_metadata()
            messages = _differences(described, wanted, num_blocks)
            if self.format == "DCP":
                names = [name for name in wanted if _is_tensor(described, name)]
                cut = dcp_files.incomplete(described, names, Path(self._path))
                if cut:
                    cut_names = some_names(f"{name} ({what})" for name, what in cut.items())
                    messages.append(f"tensors that are not wholly there: {cut_names}; fetch the files again")
        except ConfigError:
            raise
        except Exception as error:  # whatever a reader stumbles over, it is the file's
            raise self._unfit(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        if messages:
            raise ConfigError([Problem(_PATH_KEY, message, self._path) for message in messages])
        self._in_parts = self._has_parts(trunk)

    def load(self, model: Any) -> list[Problem]:
        """Reads this rank's own shards into `model`.

        Returns:
            What was wrong: files that have become others since `check`, or tensors that hold NaN or infinities.
        """
        not_finite = []
        try:
            # torchtitan gathers what it turns about or splits (queries, keys, values), so it gets one block at a time.
            for prefix, module in _parts(model) if self._in_parts else [("", model)]:
                state_dict = module.state_dict(prefix=prefix)
                if model.enable_weight_tying:
                    state_dict.pop("lm_head.weight", None)  # one tensor with the embedding
                if not state_dict:
                    continue
                read = self._read(state_dict)
                loaded = {name: read[name] for name in state_dict}
                not_finite += [name for name, tensor in loaded.items() if not _is_finite(tensor)]
                loaded = {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}
                module.load_state_dict(loaded, strict=not model.enable_weight_tying)
        except (Exception, CheckpointException) as error:  # the latter is no Exception, only a BaseException
            return self._unfit(_first_cause(error)).problems
        if not not_finite:
            return []
        message = f"these tensors hold NaN or infinite values: {some_names(not_finite)}; fetch the files again"
        return [Problem(_PATH_KEY, message, self._path)]

    def _read(self, state_dict: dict[str, Any]) -> Mapping[str, Any]:
        """Reads this rank's rows of some of the model's tensors, maybe in place."""
        # Every rank plans and reads for itself, so that ranks without a teacher need not take part.
        if self.format == "DCP":
            dcp_files.load(state_dict, dcp_files.open_checkpoint(self._path))
            return state_dict
        adapter = self._adapter(self._path)
        hf_state_dict = adapter.to_hf(state_dict)
        dcp.load(hf_state_dict, storage_reader=_row_reader(adapter, self._path), no_dist=True)
        return adapter.from_hf(hf_state_dict)

    def _has_parts(self, trunk: nn.Module) -> bool:
        """Whether a model's parts make the whole, also for its adapter; `trunk` is on the meta device."""
        found: list[str] = []
        try:
            for prefix, module in _parts(trunk):
                state_dict = module.state_dict(prefix=prefix)
                if self.format != "DCP":
                    adapter = self._adapter(None)
                    state_dict = adapter.from_hf(adapter.to_hf(state_dict))
                found += state_dict
        except Exception:  # an adapter may need the others, in any way
            return False
        return sorted(found) == sorted(trunk.state_dict())

    def _adapter(self, path: str | None) -> Any:
        assert self._spec.state_dict_adapter is not None
        config: Any = copy.copy(self._spec.model)
        config.enable_weight_tying = False  # a tied head is the embedding, and no part of what is read
        return self._spec.state_dict_adapter(config, path)

    def _unfit(self, cause: str) -> ConfigError:
        message = f"the weights do not fit the teacher spec {self._name!r} or cannot be read: {cause}"
        return ConfigError(Problem(_PATH_KEY, message, self._path))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A decoder's blocks and what it has besides, each with what the names of its tensors begin with."""
    for name, child in model.named_children():
        if name == "layers":
            yield from ((f"layers.{number}.", block) for number, block in child.named_children())
        else:
            yield f"{name}.", child


class _RowReader(HuggingFaceStorageReader):
    """Reads the rows that are asked for, a piece at a time, where torch's maps the files into memory (see
    `safetensors_files`)."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        tensors = read_headers(Path(self.path), every_file=True)
        for item in plan.items:
            stored, target = tensors[item.storage_index.fqn], planner.resolve_tensor(item).detach()
            first, *others = item.storage_offsets or (0,)
            columns = [slice(offset, offset + size) for offset, size in zip(others, item.lengths[1:], strict=True)]
            for start, piece in pieces(target):
                piece.copy_(stored.rows(first + start, first + start + len(piece))[(slice(None), *columns)])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _row_reader(adapter: Any, path: str) -> HuggingFaceStorageReader:
    reader = adapter.get_hf_storage_reader(path)
    # An adapter may have one of its own, which does more than read.
    return _RowReader(path) if type(reader) is HuggingFaceStorageReader else reader


def _weights_format(path: str, spec: ModelSpec) -> str:
    if not path:
        raise ConfigError(Problem(_PATH_KEY, "set it to the folder with the teacher's weights", path))
    if not os.path.isdir(path):
        raise ConfigError(Problem(_PATH_KEY, "no such folder", path))
    files = os.listdir(path)
    if ".metadata" in files:
        return "DCP"
    if any(f.endswith(".safetensors") for f in files):
        if spec.state_dict_adapter is None:
            message = f"{spec.name} has no adapter for Hugging Face weights; give a torchtitan checkpoint (DCP)"
            raise ConfigError(Problem(_PATH_KEY, message, path))
        return "safetensors"
    message = "the folder holds neither a torchtitan checkpoint (DCP) nor *.safetensors"
    raise ConfigError(Problem(_PATH_KEY, message, path))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Of this rank's part of it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not local.is_floating_point() or bool(local.isfinite().all())


def _is_tensor(described: Metadata, name: str) -> bool:
    return isinstance(described.state_dict_metadata.get(name), TensorStorageMetadata)


def _differences(described: Metadata, wanted: Mapping[str, torch.Tensor], num_blocks: int) -> list[str]:
    """What is wrong with the tensors that a checkpoint describes, `wanted` being those of a model of `num_blocks`."""
    missing, mismatched = [], []
    for name, tensor in wanted.items():
        stored: Any = described.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            missing.append(name)
        elif stored.size != tensor.shape:
            mismatched.append(f"{name} (file {tuple(stored.size)}, spec {tuple(tensor.shape)})")
        elif stored.properties.dtype.is_floating_point != tensor.dtype.is_floating_point:
            mismatched.append(f"{name} (file {stored.properties.dtype}, spec {tensor.dtype})")
    messages = []
    if missing:
        messages.append(f"the checkpoint lacks tensors that the spec asks for: {some_names(missing)}")
    if mismatched:
        messages.append(f"tensors that are not as the spec says: {some_names(mismatched)}")
    return messages + _surplus(described.state_dict_metadata, wanted, num_blocks)


def _surplus(names: Iterable[str], wanted: Collection[str], num_blocks: int) -> list[str]:
    """Tensors of blocks that would silently be left out, and make another model of it.

    A deeper model's weights would load into its lower blocks; those of one with biases would lose them.
    """
    tensors = {name: int(match[1]) for name in names if (match := _BLOCK.match(name))}
    depth = max(tensors.values(), default=-1) + 1
    if depth > num_blocks:
        return [f"the checkpoint has {depth} blocks, the spec {num_blocks}"]
    # Old checkpoints hold the rotary frequencies, which follow from the configuration.
    surplus = [name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if surplus:
        return [f"the checkpoint has tensors that the spec knows nothing of: {some_names(surplus)}"]
    return []


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # holds, for each rank, what it caught
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".splitlines()[0]
