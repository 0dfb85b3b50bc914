"""Rows of stored states in safetensors files, found by what they are the states of.

A row's key is a hash of its token ids and positions. So a row never gets another's states, whatever the order in which
rows are asked for, a row that comes again (a second epoch, an interrupted export) is stored once, and nothing has to be
known of the data loader. A file is written under another name and then renamed: what bears its name is whole.

Shape legend: B rows of a batch, N rows of a file, L sequence, C channels of a column.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from let_plugin.config.errors import ConfigError, Problem

FEATURES_KEY = "let.teacher.features"
KEY_BYTES = 16  # 128 bits: among 10^12 rows, two share a key with a probability of 10^-15

_KEYS = "keys"
_METADATA = "let"  # one entry, as safetensors writes several in no fixed order
_MAX_HEADER_BYTES = 100_000_000  # as safetensors has it
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}


def row_keys(input_dict: Mapping[str, torch.Tensor]) -> list[bytes]:
    """The key of each row of a batch on the CPU: of its "input" and, if it has them, its "positions", [B, L]."""
    tokens_BL, positions_BL = input_dict["input"], input_dict.get("positions")
    keys = []
    for i in range(len(tokens_BL)):
        digest = hashlib.blake2b(_bytes(tokens_BL[i]), digest_size=KEY_BYTES)
        if positions_BL is not None:
            digest.update(_bytes(positions_BL[i]))
        keys.append(digest.digest())
    return keys


def _bytes(ids_L: torch.Tensor) -> bytes:
    return np.ascontiguousarray(ids_L.numpy(), dtype="<i8").tobytes()


def damaged(path: Path, why: str) -> ConfigError:
    """The error for a file that is not what was written."""
    message = f"{path.name} is damaged ({why}); delete that file and run the same let-teacher export again"
    return ConfigError(Problem(FEATURES_KEY, message, str(path.parent)))


def write_safely(path: Path, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _Tensor(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Shard:
    """A file of rows, read through a memory map. Opening it reads its header and checks its size.

    Args:
        path: The file. No descriptor of it is kept: there may be thousands.

    Attributes:
        num_rows: N.
        metadata: What its writer had to say beside the rows.

    Raises:
        ConfigError: If it is truncated, or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors, self.metadata = _read_header(path)
            self.num_rows = self._tensors[_KEYS].shape[0]
            if any(tensor.shape[0] != self.num_rows for tensor in self._tensors.values()):
                raise ValueError("its columns differ in their rows")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise damaged(path, f"{error}" or type(error).__name__) from error
        self._map: torch.Tensor | None = None

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of each column: its dtype, and the shape [L, C] that it has of a row."""
        return {name: (t.dtype, t.shape[1:]) for name, t in self._tensors.items() if name != _KEYS}

    def keys(self) -> np.ndarray:
        """The rows' keys, [N] of dtype S16, which numpy can sort."""
        return self._rows(_KEYS).numpy().copy().view(f"S{KEY_BYTES}")[:, 0]

    def read(self, column: str, row: int, out_LC: torch.Tensor) -> None:
        """Copies a row of a column to `out_LC`, a contiguous tensor of its dtype and shape."""
        out_LC.view(torch.uint8).view(-1).copy_(self._rows(column)[row])

    def will_need(self, columns: Sequence[str], row: int, num_rows: int) -> None:
        """Tells the kernel, where it can be told, to read these rows ahead. Returns at once."""
        if row >= self.num_rows or not hasattr(os, "posix_fadvise"):
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for column in columns:
                tensor = self._tensors[column]
                start, length = tensor.start + row * tensor.row_bytes, num_rows * tensor.row_bytes
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def _rows(self, column: str) -> torch.Tensor:
        """The bytes of all rows of a column, [N, bytes], in the file itself."""
        if self._map is None:
            size = self.path.stat().st_size
            self._map = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        tensor = self._tensors[column]
        return self._map[tensor.start :][: self.num_rows * tensor.row_bytes].view(self.num_rows, tensor.row_bytes)


def _read_header(path: Path) -> tuple[dict[str, _Tensor], dict[str, Any]]:
    """The header of a safetensors file. ValueError, KeyError or TypeError if that is not what it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("its header is incomplete")
        header = json.loads(file.read(length))
    metadata = json.loads(header.pop("__metadata__")[_METADATA])
    tensors, end = {}, 8 + length
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensor = _Tensor(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + first)
        if last - first != tensor.shape[0] * tensor.row_bytes:
            raise ValueError(f"{name} does not have the size of its shape")
        tensors[name] = tensor
        end = max(end, 8 + length + last)
    if size != end:
        raise ValueError(f"{size:,} bytes instead of {end:,}")
    return tensors, metadata


def shard_paths(folder: Path, stream: int | None = None) -> list[Path]:
    """The files in `folder`, of one stream or of all, in the order in which they were written."""
    return sorted(folder.glob(f"rows-{'*' if stream is None else f'{stream:05d}'}-*.safetensors"))


class ShardWriter:
    """Writes the rows of one stream (what one data-parallel rank reads), and knows what an earlier run has written.

    Args:
        folder: Of the export.
        stream: The data-parallel rank.
        rows_per_shard: Rows of each file but the last.

    Raises:
        ConfigError: If a file of an earlier run is damaged.
    """

    def __init__(self, folder: Path, stream: int, rows_per_shard: int) -> None:
        self._folder = folder
        self._stream = stream
        self._rows_per_shard = rows_per_shard
        shards = [Shard(path) for path in shard_paths(folder, stream)]
        # Files that follow a missing one are of no use: they are written again, as they were.
        whole = next((i for i, s in enumerate(shards) if s.path != self._path(i)), len(shards))
        self._num_shards = whole
        self._known = {bytes(key) for shard in shards[:whole] for key in shard.keys().view(f"V{KEY_BYTES}")}
        self._keys: list[bytes] = []
        self._columns: dict[str, list[torch.Tensor]] = {}
        self._cosines: dict[str, list[torch.Tensor]] = {}

    @property
    def num_rows(self) -> int:
        """Rows that are in the files, or about to be written to one."""
        return len(self._known)

    def new_rows(self, keys: Sequence[bytes]) -> list[int]:
        """Which of a batch's rows are not stored yet; of equal ones the first."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        return sorted(i for key, i in first.items() if key not in self._known)

    def add(self, key: bytes, columns: Mapping[str, torch.Tensor], cosines: Mapping[str, torch.Tensor]) -> None:
        """Takes a new row; writes a file when there are enough.

        Args:
            key: The row's.
            columns: Name -> [L, C], on the CPU.
            cosines: Layer -> cosines of the row's tokens, [tokens], fp32, on the CPU: how well it is stored.
        """
        self._known.add(key)
        self._keys.append(key)
        for name, tensor_LC in columns.items():
            self._columns.setdefault(name, []).append(tensor_LC)
        for layer, values in cosines.items():
            self._cosines.setdefault(layer, []).append(values)
        if len(self._keys) == self._rows_per_shard:
            self.finish()

    def finish(self) -> None:
        """Writes the rows that are left, if any."""
        if not self._keys:
            return
        keys_NK = torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
        tensors = {_KEYS: keys_NK, **{name: torch.stack(rows) for name, rows in self._columns.items()}}
        fidelity = {layer: _fidelity(torch.cat(values)) for layer, values in self._cosines.items()}
        metadata = {_METADATA: json.dumps({"fidelity": fidelity})}
        write_safely(self._path(self._num_shards), save(tensors, metadata))
        self._num_shards += 1
        self._keys, self._columns, self._cosines = [], {}, {}

    def _path(self, number: int) -> Path:
        return self._folder / f"rows-{self._stream:05d}-{number:06d}.safetensors"


def _fidelity(cosines: torch.Tensor) -> dict[str, float]:
    if not len(cosines):
        return {"tokens": 0, "mean": 1.0, "percentile_1": 1.0}
    # kthvalue, as torch.quantile takes 16 million values at most.
    percentile = cosines.kthvalue(max(1, math.ceil(len(cosines) / 100))).values
    return {"tokens": len(cosines), "mean": cosines.double().mean().item(), "percentile_1": percentile.item()}


class RowReader:
    """Finds rows in all files of a folder and copies them out.

    Args:
        folder: Of the export.
        columns: Those that are read.

    Raises:
        ConfigError: If a file is damaged or there is none.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._folder, self._columns = folder, tuple(columns)
        self._shards = [Shard(path) for path in shard_paths(folder)]
        for shard in self._shards:
            if missing := [name for name in columns if name not in shard.columns]:
                raise damaged(shard.path, f"it has no {', '.join(missing)}")
        keys = np.concatenate([shard.keys() for shard in self._shards]) if self._shards else np.empty(0, "S16")
        shards = np.repeat(np.arange(len(self._shards)), [shard.num_rows for shard in self._shards])
        rows = np.concatenate([np.arange(shard.num_rows) for shard in self._shards]) if self._shards else shards
        order = np.argsort(keys, kind="stable")
        self._keys, self._shard_of, self._row_of = keys[order], shards[order], rows[order]

    def __reduce__(self) -> Any:  # workers that are not forked open the files anew
        return RowReader, (self._folder, self._columns)

    def read(self, keys: Sequence[bytes]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The columns of these rows, name -> [B, L, C] on the CPU; and which of the rows there are not.

        If any are missing, there are no columns.
        """
        wanted = np.frombuffer(b"".join(keys), dtype=f"S{KEY_BYTES}")
        places = np.searchsorted(self._keys, wanted)
        found = places < len(self._keys)
        found[found] = self._keys[places[found]] == wanted[found]
        if not found.all():
            return {}, np.flatnonzero(~found).tolist()
        where = [(self._shards[self._shard_of[place]], int(self._row_of[place])) for place in places]
        result = {}
        for name in self._columns:
            dtype, shape = where[0][0].columns[name]
            result[name] = torch.empty(len(keys), *shape, dtype=dtype)
            for i, (shard, row) in enumerate(where):
                shard.read(name, row, result[name][i])
        # Rows were written in the order of the stream: what follows is what will be asked for next.
        shard, row = where[-1]
        shard.will_need(self._columns, row + 1, len(keys))
        return result, []
