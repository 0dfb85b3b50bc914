"""What can be read of a teacher's files without loading them: size, data types, licence."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from let_plugin.errors import ConfigError, Problem

_PATH_KEY = "let.teacher.path"


@dataclass(frozen=True)
class WeightFiles:
    """The files of a teacher's weights.

    Attributes:
        format: "safetensors", "DCP" or "GGUF".
        num_bytes: Size of them all.
        dtypes: Number of tensors of each data type, by the format's own names, the most frequent first.
    """

    format: str
    num_bytes: int
    dtypes: dict[str, int]


def read_weight_files(path: str) -> WeightFiles:
    """Reads the headers of a .gguf file, or of the weights in a local folder. ConfigError if they cannot be read."""
    try:
        if os.path.isfile(path):
            return WeightFiles("GGUF", os.path.getsize(path), _counted(_gguf_dtypes(path)))
        folder = Path(path)
        if (folder / ".metadata").is_file():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            return WeightFiles("DCP", size, _counted(_dcp_dtypes(path)))
        files = sorted(folder.glob("*.safetensors"))
        dtypes = [dtype for file in files for dtype in _safetensors_dtypes(file)]
        return WeightFiles("safetensors", sum(file.stat().st_size for file in files), _counted(dtypes))
    except Exception as error:  # a damaged file fails in the reader: any type of error
        message = f"its weights cannot be read: {type(error).__name__}: {error}"
        raise ConfigError(Problem(_PATH_KEY, message, path)) from error


def read_licence(path: str) -> str:
    """The licence that a .gguf file or a local folder states, and where; "not stated" if it does not."""
    if os.path.isfile(path):
        return _gguf_licence(path) or "not stated"
    folder = Path(path)
    readme = folder / "README.md"
    if readme.is_file() and (licence := _front_matter_licence(readme)):
        return f"{licence} (README.md)"
    config_file = folder / "config.json"
    if config_file.is_file():
        content = json.loads(config_file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("license"), str):
            return f"{content['license']} (config.json)"
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().startswith(("license", "licence")))
    return f"see {files[0]} there" if files else "not stated"


def _counted(dtypes: Iterable[str]) -> dict[str, int]:
    return dict(Counter(dtypes).most_common())


def _safetensors_dtypes(file: Path) -> list[str]:
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]


def _dcp_dtypes(path: str) -> list[str]:
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in metadata if isinstance(entry, TensorStorageMetadata)]
    return [str(entry.properties.dtype).removeprefix("torch.") for entry in tensors]


def _gguf_dtypes(path: str) -> list[str]:
    from gguf import GGUFReader

    return [tensor.tensor_type.name for tensor in GGUFReader(path).tensors]


def _gguf_licence(path: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return None if field is None else f"{field.contents()} (general.license)"


def _front_matter_licence(readme: Path) -> str | None:
    """`license` of a model card; where that is "other", the name that it gives instead."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(readme) or {}
    except Exception:  # not YAML between the dashes: then it is no front matter
        return None
    licence = metadata.get("license")
    if licence == "other":
        licence = metadata.get("license_name") or metadata.get("license_link") or licence
    return None if licence is None else str(licence)
