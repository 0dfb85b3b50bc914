"""Rows of stored states in safetensors files, and how states are encoded in them.

A row is found by a hash of its token ids and positions. So a row never gets another's states, whatever the order in
which rows are asked for; a row that comes again (a second epoch, an interrupted export) is stored once; and nothing has
to be known of the data loader. A file is written under another name and then renamed, so that it is there as a whole or
not at all.

Shape legend: B rows of a batch, N rows of a file, L sequence, E width of one layer's states, C channels of a column.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from let_plugin.config.errors import ConfigError, Problem

FEATURES_KEY = "let.teacher.features"
KEY_BYTES = 16  # 128 bits: among 10^12 rows, two share a key with a probability of 10^-15
# Encoding -> names of its columns.
ENCODINGS = {"bfloat16": ("values",), "int8": ("values", "scales")}

MISSING = "missing"
_KEYS = "keys"
_INT8_MAX = 127


def bytes_per_token(encoding: str, width: int) -> int:
    """What the state of one token and layer of this width takes."""
    return width + 4 if encoding == "int8" else 2 * width


def encode(states_BLE: torch.Tensor, encoding: str) -> dict[str, torch.Tensor]:
    """The columns, name -> [B, L, C], of one layer's states of any floating dtype. Zeros stay zeros.

    "bfloat16": the states, rounded: bit for bit those of a teacher in bfloat16. "int8": integers from -127 to 127, and
    a scale per token in fp32, its largest channel / 127. The error of a channel is at most half of the scale.
    """
    if encoding == "bfloat16":
        return {"values": states_BLE.bfloat16()}
    states_BLE = states_BLE.float()
    scales_BL1 = states_BLE.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
    # A scale of 0 is that of a state of zeros: 0 / 1. The clamp is for a scale that was rounded down.
    values_BLE = (states_BLE / scales_BL1.masked_fill(scales_BL1 == 0, 1)).round().clamp(-_INT8_MAX, _INT8_MAX)
    return {"values": values_BLE.to(torch.int8), "scales": scales_BL1}


def decode(columns: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The states in `dtype`, [B, L, E], from their columns."""
    values_BLE = columns["values"]
    return (values_BLE.float() * columns["scales"] if "scales" in columns else values_BLE).to(dtype)


def row_keys(input_dict: Mapping[str, torch.Tensor]) -> list[bytes]:
    """The key of each row of a batch on the CPU: of its "input" and, if it has them, its "positions", [B, L]."""
    parts = [input_dict[name] for name in ("input", "positions") if name in input_dict]
    keys = []
    for row in zip(*parts, strict=True):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for ids_L in row:
            digest.update(np.ascontiguousarray(ids_L.numpy(), dtype="<i8").tobytes())
        keys.append(digest.digest())
    return keys


def write_safely(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def shard_paths(folder: Path, stream: int | None = None) -> list[Path]:
    """The files in `folder`, of one stream or of all, in the order in which they were written."""
    return sorted(folder.glob(f"rows-{'*' if stream is None else f'{stream:05d}'}-*.safetensors"))


class Shard:
    """A file of rows, read through a memory map: no descriptor is kept, there may be thousands.

    ConfigError if it is damaged, or no such file. The rows' `keys`, [N], have dtype S16, which numpy can sort.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.columns = set(self._file.keys()) - {_KEYS}
            self.keys = self._file.get_tensor(_KEYS).numpy().copy().view(f"S{KEY_BYTES}")[:, 0]
        except (OSError, SafetensorError, ValueError) as error:
            message = f"{path.name} is damaged ({error}); delete that file and run the same let-teacher export again"
            raise ConfigError(Problem(FEATURES_KEY, message, str(path.parent))) from error

    def read(self, column: str, row: int) -> torch.Tensor:
        """A row of a column, [L, C]."""
        return self._file.get_slice(column)[row]


class ShardWriter:
    """Writes the rows of one stream (what one data-parallel rank reads), and knows what an earlier run has written.

    ConfigError if a file of an earlier run is damaged. All files but the last have `rows_per_shard` rows.
    """

    def __init__(self, folder: Path, stream: int, rows_per_shard: int) -> None:
        self._folder = folder
        self._stream = stream
        self._rows_per_shard = rows_per_shard
        shards = [Shard(path) for path in shard_paths(folder, stream)]
        # Files that follow a missing one are of no use: they are written again, as they were.
        self._num_shards = next((i for i, s in enumerate(shards) if s.path != self._path(i)), len(shards))
        self._known = {bytes(key) for s in shards[: self._num_shards] for key in s.keys.view(f"V{KEY_BYTES}")}
        self._rows: list[tuple[bytes, Mapping[str, torch.Tensor]]] = []

    def new_rows(self, keys: Sequence[bytes]) -> list[int]:
        """Which of a batch's rows are not stored yet; of equal ones the first."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        return sorted(i for key, i in first.items() if key not in self._known)

    def add(self, key: bytes, columns: Mapping[str, torch.Tensor]) -> None:
        """Takes a new row, its columns [L, C] on the CPU; writes a file when there are enough."""
        self._known.add(key)
        self._rows.append((key, columns))
        if len(self._rows) == self._rows_per_shard:
            self.finish()

    def finish(self) -> None:
        """Writes the rows that are left, if any."""
        if not self._rows:
            return
        keys, columns = zip(*self._rows, strict=True)
        tensors = {name: torch.stack([row[name] for row in columns]) for name in columns[0]}
        tensors[_KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
        write_safely(self._path(self._num_shards), save(tensors))
        self._num_shards += 1
        self._rows.clear()

    def _path(self, number: int) -> Path:
        return self._folder / f"rows-{self._stream:05d}-{number:06d}.safetensors"


class RowReader:
    """Finds the rows of a batch in all files of a folder, and reads these columns; what the data loader calls.

    ConfigError if a file is damaged or lacks a column.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._folder, self._columns = folder, tuple(columns)
        self._shards = [Shard(path) for path in shard_paths(folder)]
        for shard in self._shards:
            if missing := set(columns) - shard.columns:
                message = f"{shard.path.name} has no {', '.join(sorted(missing))}; export again"
                raise ConfigError(Problem(FEATURES_KEY, message, str(folder)))
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(shard.keys for shard in self._shards)])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in self._shards)])  # first row of each file, of all

    def __reduce__(self) -> Any:  # workers that are not forked open the files anew
        return RowReader, (self._folder, self._columns)

    def __call__(
        self, input_dict: Mapping[str, torch.Tensor], labels_BL: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The columns of a batch's rows, name -> [B, L, C] on the CPU. If any row is not stored, MISSING: which, [B].

        That is no error yet: the data loader's workers read ahead, beyond the stop step.
        """
        wanted = np.frombuffer(b"".join(row_keys(input_dict)), dtype=f"S{KEY_BYTES}")
        ranks = np.searchsorted(self._keys, wanted)
        found = ranks < len(self._keys)
        found[found] = self._keys[ranks[found]] == wanted[found]
        if not found.all():
            return {MISSING: torch.from_numpy(~found)}
        rows = self._order[ranks]
        files = np.searchsorted(self._starts, rows, side="right") - 1
        places = [(self._shards[file], row) for file, row in zip(files, rows - self._starts[files], strict=True)]
        return {name: torch.stack([shard.read(name, int(row)) for shard, row in places]) for name in self._columns}
