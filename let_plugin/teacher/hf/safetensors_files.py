"""The tensors in a folder of safetensors files: what their headers say, and any rows of any of them.

Rows are read with plain reads at the right place. The `safetensors` library maps a file into memory, where the pages
that were touched count as the process's, or reads a whole tensor for any slice of it.

The format: 8 bytes with the length N of the header, little-endian; N bytes of JSON, name -> {dtype, shape,
data_offsets}; then the data (https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from let_plugin.config.errors import ConfigError, Problem

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PATH_KEY = "let.teacher.path"
_MAX_NAMED_TENSORS = 8
_PIECE_BYTES = 16 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet.

    Attributes:
        file: The file that it is in.
        dtype: Its data type there.
        shape: Its shape.
        offset: Where its first byte is, in bytes from the start of the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Entries `start` to `stop` (exclusive) of its first dimension, on the CPU; of a scalar the one that it is.

        OSError if the file has become shorter since its header was read.
        """
        shape = (stop - start, *self.shape[1:])
        rows = torch.empty(shape, dtype=self.dtype)
        if rows.numel() == 0:
            return rows
        buffer: Any = memoryview(rows.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        place = self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as f:
            while buffer:  # one read may return less than was asked for
                num_read = os.preadv(f.fileno(), [buffer], place)
                if num_read == 0:
                    raise OSError(f"{self.file.name} ends too early")
                buffer, place = buffer[num_read:], place + num_read
        return rows


def pieces(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Views of a tensor's rows, each with the number of its first one: at most 16 MiB at a time, as fp32, or one row.

    A scalar is one row. Of a tensor without elements there are none.
    """
    if tensor.numel() == 0:
        return
    if tensor.dim() == 0:
        tensor = tensor.view(1)
    num_rows = max(1, _PIECE_BYTES // (tensor[0].numel() * 4))
    for start in range(0, len(tensor), num_rows):
        yield start, tensor[start : start + num_rows]


def read_headers(folder: Path, *, every_file: bool = False) -> dict[str, StoredTensor]:
    """Name -> tensor, of all the files of the checkpoint in `folder`.

    These are `model.safetensors`, or else those that the index names, as `transformers` has it; with `every_file` all
    *.safetensors there and those that the index names, as torchtitan has it, which needs no index.

    ConfigError that names files and tensors if a file is missing, damaged or shorter than its header says.
    """
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for name in _every_file_name(folder) if every_file else _file_names(folder):
        try:
            tensors |= _read_header(folder / name)
        except ValueError as error:
            problems.append(Problem(_PATH_KEY, str(error), str(folder)))
    if problems:
        raise ConfigError(problems)
    return tensors


def some_names(names: Iterable[str]) -> str:
    """The first few of them, for a message."""
    names = sorted(names)
    more = len(names) - _MAX_NAMED_TENSORS
    return ", ".join(names[:_MAX_NAMED_TENSORS]) + (f" and {more} more" if more > 0 else "")


def _file_names(folder: Path) -> list[str]:
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if outside := sorted(name for name in names if Path(name).name != name):
            raise ValueError(f"it names files outside the folder: {some_names(outside)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(Problem(_PATH_KEY, f"its {INDEX} cannot be read: {error!r}", str(folder))) from error
    return sorted(names)


def _every_file_name(folder: Path) -> list[str]:
    named = _file_names(folder) if (folder / INDEX).is_file() else []
    return sorted({*named, *(file.name for file in folder.glob("*.safetensors"))})


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """ValueError, with the file's and the tensors' names, if the file cannot hold what its header says."""
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    size = file.stat().st_size
    with file.open("rb") as f:
        header_size = int.from_bytes(f.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError(f"{file.name} is truncated, or is not a safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(f.read(header_size))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
            dtypes = {name: _DTYPES.get(entry["dtype"]) for name, entry in entries.items()}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{file.name} is not a safetensors file: {error!r}") from error
    start = 8 + header_size
    if unknown := [f"{name} ({entries[name]['dtype']})" for name, dtype in dtypes.items() if dtype is None]:
        raise ValueError(f"{file.name} holds tensors of an unknown data type: {some_names(unknown)}")
    if wrong := [name for name in entries if not _fits(spans[name], shapes[name], dtypes[name])]:
        raise ValueError(f"{file.name} is damaged: place and size do not agree for {some_names(wrong)}; fetch it again")
    if cut := [name for name, span in spans.items() if start + span[1] > size]:
        raise ValueError(f"{file.name} is truncated: it lacks (part of) {some_names(cut)}; fetch it again")
    return {name: StoredTensor(file, dtypes[name], shapes[name], start + spans[name][0]) for name in entries}  # type: ignore[arg-type]


def _fits(span: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> bool:
    return len(span) == 2 and span[0] >= 0 and span[1] - span[0] == math.prod(shape) * dtype.itemsize
