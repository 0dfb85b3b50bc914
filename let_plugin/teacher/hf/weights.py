"""Reads a checkpoint into a `transformers` trunk that is already where it will stay: cut, sharded, on its device.

One tensor at a time, and of a tensor that is stored as the trunk wants it only this rank's rows, a piece at a time.
What `transformers` has to make of several stored tensors first (the experts of a mixture, which it keeps as one) is
made whole, by `transformers`' own converters, before this rank's rows are taken: then one such tensor is in CPU memory
at a time. Of several ranks none holds the teacher whole, unless it is quantised.

Names are matched as `from_pretrained` matches them, by the same functions.
"""

import copy
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.hf.checks import find_layers
from let_plugin.teacher.hf.safetensors_files import StoredTensor, pieces, read_headers, some_names
from let_plugin.teacher.quantization import quantize_linear

_PATH_KEY = "let.teacher.path"


class Rows(Protocol):
    """A tensor that is not read before it is asked for rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Entries `start` to `stop` (exclusive) of its first dimension, on the CPU; of a scalar the one that it is."""


@dataclass(frozen=True)
class WholeTensor:
    """A tensor in memory, as Rows."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor[start:stop] if self.tensor.dim() else self.tensor.view(1)


@dataclass(frozen=True)
class Step:
    """Tensors of the trunk that are read together.

    Attributes:
        names: Theirs, in the trunk.
        fetch: Returns them by name. They may be those of a whole trunk, where the trunk has been cut.
    """

    names: Collection[str]
    fetch: Callable[[], Mapping[str, Rows]]


@dataclass
class Fit:
    """How the tensors of a checkpoint fit a trunk.

    Attributes:
        steps: What there is to read.
        missing: Names of the trunk's tensors that the checkpoint lacks.
        mismatched: What is wrong with those of another shape or kind of data type.
        unexpected: Names, in the checkpoint, of what the trunk has no place for.
    """

    steps: list[Step] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def check(self, trunk: nn.Module, num_layers: int, path: str) -> None:
        """ConfigError that names the tensors, unless the checkpoint has every tensor of the whole trunk, and fits it.

        A head, or a buffer of an old version, is expected to be left over; a whole layer means a wrong config.json.
        """
        layers = find_layers(trunk, num_layers)
        prefix = next(name for name, module in trunk.named_modules() if module is layers)
        in_layers = re.compile(rf"(^|\.){re.escape(prefix)}\.(\d+)\.")
        surplus = [n for n in self.unexpected if (match := in_layers.search(n)) and int(match[2]) >= num_layers]
        messages = []
        if self.missing:
            messages.append(f"the checkpoint lacks tensors that its configuration asks for: {some_names(self.missing)}")
        if self.mismatched:
            messages.append(f"tensors that are not as its configuration says: {some_names(self.mismatched)}")
        if surplus:
            message = f"the checkpoint has more layers than its configuration ({num_layers})"
            messages.append(f"{message}: {some_names(surplus)}")
        if messages:
            raise ConfigError([Problem(_PATH_KEY, message, path) for message in messages])


def fit_safetensors(folder: Path, trunk: Any) -> Fit:
    """Matches the headers of the safetensors in `folder` with a whole `transformers` trunk, on the meta device.

    ConfigError for files that are missing, truncated or damaged.
    """
    return _fit(read_headers(folder), trunk)


def note_missing(fit: Fit, trunk: Any) -> None:
    """Fills in `fit.missing`: what no step brings, apart from other names of what one does (tied weights)."""
    state = trunk.state_dict(keep_vars=True)
    names = {name for step in fit.steps for name in step.names}
    found = {id(state[name]) for name in names & state.keys()}
    ignored = [re.compile(pattern) for pattern in getattr(trunk, "_keys_to_ignore_on_load_missing", None) or ()]
    fit.missing = [
        name
        for name, tensor in state.items()
        if id(tensor) not in found and not any(pattern.search(name) for pattern in ignored)
    ]


@torch.no_grad()
def load(trunk: nn.Module, steps: Iterable[Step], device: torch.device, path: str) -> list[Problem]:
    """Reads each rank's rows into the parameters and persistent buffers of a trunk that is where it will stay.

    A weight that is still on the meta device is one to be quantised: it is put on `device` when its turn comes, and
    quantised as soon as it has been read.

    Returns:
        What was wrong with this rank's rows: tensors that cannot be read, or hold NaN or infinities.
    """
    state = trunk.state_dict(keep_vars=True)
    done: set[int] = set()
    not_finite, unreadable = [], []
    for step in steps:
        wanted = [name for name in step.names if name in state and id(state[name]) not in done]
        if not wanted:
            continue
        done |= {id(state[name]) for name in wanted}
        try:
            fetched = step.fetch()
            for name in wanted:
                is_finite = _fill(_materialised(trunk, name, device), fetched[name])
                if state[name].is_meta:
                    quantize_linear(trunk.get_submodule(name.rpartition(".")[0]))
                if not is_finite:
                    not_finite.append(name)
        except Exception as error:  # whatever a damaged file brings about in a reader, or a converter of `transformers`
            unreadable.append(f"{some_names(wanted)} cannot be read: {type(error).__name__}: {error}")
    if not_finite:
        unreadable.append(f"these tensors hold NaN or infinite values: {some_names(not_finite)}; fetch the files again")
    return [Problem(_PATH_KEY, message, path) for message in unreadable]


def _fit(tensors: Mapping[str, StoredTensor], trunk: Any) -> Fit:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    fit = Fit()
    state = trunk.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(trunk)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, str] = {}
    converted: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, trunk.base_model_prefix, state)
        if name not in state and stored in state:
            name, pattern = stored, None
        if name not in state:
            fit.unexpected.append(stored)
        elif pattern is None:
            plain.setdefault(name, stored)
        else:
            converted.setdefault(name, []).append((pattern, stored))
    for name, stored in plain.items():
        _compare(fit, name, tensors[stored], state[name])
        fit.steps.append(Step([name], functools.partial(dict, {name: tensors[stored]})))
    for name, sources in converted.items():
        conversion = _Conversion(trunk, name, converter_of[sources[0][0]], sources, tensors)
        try:
            outputs = conversion.on_meta()
        except Exception as error:  # what a converter says when it lacks one of its tensors
            fit.mismatched.append(f"{name} ({len(sources)} tensors in the file, which do not combine: {error})")
            outputs = {name: state[name]}
        for output in outputs.keys() & state.keys():
            _compare(fit, output, outputs[output], state[output])
        fit.steps.append(Step(list(outputs), conversion))
    note_missing(fit, trunk)
    return fit


def _compare(fit: Fit, name: str, stored: Any, wanted: torch.Tensor) -> None:
    """Notes a tensor of another shape, or of integers where the trunk has floating-point numbers."""
    if tuple(stored.shape) != tuple(wanted.shape):
        fit.mismatched.append(f"{name} (file {tuple(stored.shape)}, configuration {tuple(wanted.shape)})")
    elif stored.dtype.is_floating_point != wanted.dtype.is_floating_point:
        fit.mismatched.append(f"{name} (file {_name(stored.dtype)}, configuration {_name(wanted.dtype)})")


@dataclass(frozen=True)
class _Conversion:
    """What one of `transformers`' converters makes of some stored tensors: a Step's `fetch`.

    Attributes:
        trunk: The whole trunk, on the meta device: some converters ask for its configuration.
        name: The first, in the trunk, of what it makes.
        converter: A WeightConverter, of which a copy is used.
        sources: Its patterns, with the names of the tensors that they found.
        tensors: All that is stored.
    """

    trunk: Any
    name: str
    converter: Any
    sources: list[tuple[str, str]]
    tensors: Mapping[str, StoredTensor]

    def __call__(self) -> dict[str, Rows]:
        read = self._convert(lambda stored: stored.rows(0, stored.shape[0]))
        return {name: WholeTensor(tensor) for name, tensor in read.items()}

    def on_meta(self) -> dict[str, torch.Tensor]:
        """The tensors without their values."""
        return self._convert(lambda stored: torch.empty(stored.shape, dtype=stored.dtype, device="meta"))

    def _convert(self, read: Callable[[StoredTensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.sources:
            converter.add_tensor(self.name, stored, pattern, read(self.tensors[stored]))
        made = converter.convert(self.name, model=self.trunk, config=self.trunk.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _materialised(trunk: nn.Module, name: str, device: torch.device) -> torch.Tensor:
    """The tensor of that name; if it is on the meta device, a new one in its place on `device`."""
    module_name, _, attribute = name.rpartition(".")
    module = trunk.get_submodule(module_name)
    tensor = getattr(module, attribute)
    if tensor.is_meta:
        tensor = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=False)
        setattr(module, attribute, tensor)
    return tensor


def _fill(tensor: torch.Tensor, source: Rows) -> bool:
    """Copies this rank's rows into `tensor`, piece by piece, and returns whether all of them are finite.

    ValueError if the source has another shape.
    """
    if tuple(source.shape) != tuple(tensor.shape):
        raise ValueError(f"shape {tuple(source.shape)}, where the configuration says {tuple(tensor.shape)}")
    first = 0
    local = tensor
    if isinstance(tensor, DTensor):
        assert tensor.placements == (Shard(0),)
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        first, local = offsets[0], tensor.to_local()
    is_finite = True
    for start, piece in pieces(local):
        rows = source.rows(first + start, first + start + len(piece)).to(piece.dtype)
        # Behind the change of data type, in which a number may become too large.
        is_finite &= not rows.is_floating_point() or bool(rows.isfinite().all())
        piece.copy_(rows)
    return is_finite


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
