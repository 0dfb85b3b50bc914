"""Torch's distributed checkpoints (DCP), read without running code from them.

torch itself unpickles the file `.metadata` and every value that is not a tensor, and a pickle can run any code. Here
`.metadata` is read by an unpickler that knows only torch's descriptions of tensors, and values by `weights_only`.
"""

import io
import math
import pathlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, metadata
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_CLASSES = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    _StorageInfo,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
)
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_KNOWN: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__qualname__): known for known in _CLASSES},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _LAYOUTS.__getitem__,
    # The first releases of Python 3.11 pickle a member of an enumeration as getattr(class, name).
    ("builtins", "getattr"): lambda cls, name: metadata._MEM_FORMAT_ENCODING[name],
    # The path where the checkpoint was written; Python 3.13 has another name for the module.
    **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
}


def open_checkpoint(path: str) -> dcp.FileSystemReader:
    """A reader of the checkpoint at `path`, a folder or an fsspec URL.

    Its `read_metadata` runs no code from the file. It raises ValueError if the file is damaged or names anything that
    torch does not write there, OSError if there is no file.
    """
    return _Reader(path)


def load(state_dict: dict[str, Any], reader: dcp.StorageReader) -> None:
    """Fills `state_dict` in place from `reader`, in this process alone; runs no code from the files.

    ValueError for what cannot be read, is missing or of another kind or shape.
    """
    try:
        dcp.load(state_dict, storage_reader=reader, planner=_SafePlanner(), no_dist=True)
    except CheckpointException as error:  # a BaseException, which holds what each rank has caught
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{type(cause).__name__}: {cause}") from error


def incomplete(described: Metadata, names: Iterable[str], folder: Path) -> dict[str, str]:
    """Tensor name -> what is wrong with it, for those of `names` that are not completely in the files of `folder`."""
    problems = {}
    for name in names:
        tensor: Any = described.state_dict_metadata[name]
        for chunk in tensor.chunks:
            stored = described.storage_data[MetadataIndex(name, chunk.offsets)]
            if not (file := folder / stored.relative_path).is_file():
                problems[name] = f"{file.name} is missing"
            elif stored.offset + stored.length > file.stat().st_size:
                problems[name] = f"{file.name} is truncated"
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) < math.prod(tensor.size):
            problems[name] = "its parts are not all there"
    return problems


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _KNOWN[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None


class _Reader(FsspecReader):  # of local files, too
    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            try:
                described = _Unpickler(file).load()
                if not isinstance(described, Metadata) or not isinstance(described.state_dict_metadata, dict):
                    raise pickle.UnpicklingError(f"it is a {type(described).__name__}")
            except Exception as error:  # a damaged pickle can fail in any way
                raise ValueError(f"{path} is not one that torch has written, or is damaged: {error}") from error
        described.storage_meta = StorageMeta(load_id=self.load_id)
        return described


class _SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict[name], torch.Tensor):
            raise ValueError(f"{name} is not a tensor there")
        set_element(self.original_state_dict, self.mappings[name], torch.load(value, weights_only=True))
