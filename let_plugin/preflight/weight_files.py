"""What can be read of a teacher's files without loading them: size, data types, licence."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import dcp_files

_PATH_KEY = "let.teacher.path"
_NOT_STATED = "not stated"


@dataclass(frozen=True)
class WeightFiles:
    """The files of a teacher's weights.

    Attributes:
        format: "safetensors", "DCP" or "GGUF".
        num_bytes: Size of them all.
        dtypes: Number of tensors of each data type, by the format's own names, the most frequent first.
        licence: The one that is stated with them, and where; "not stated" if none is.
    """

    format: str
    num_bytes: int
    dtypes: dict[str, int]
    licence: str


def read_weight_files(path: str) -> WeightFiles:
    """Reads a .gguf file's header, or those of the weights in a local folder. ConfigError if they cannot be read."""
    try:
        return _read_gguf(path) if os.path.isfile(path) else _read_folder(Path(path))
    except Exception as error:  # a damaged file fails in the reader: any type of error
        message = f"its weights cannot be read: {type(error).__name__}: {error}"
        raise ConfigError(Problem(_PATH_KEY, message, path)) from error


def _read_gguf(path: str) -> WeightFiles:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    field = reader.get_field("general.license")
    licence = _NOT_STATED if field is None else f"{field.contents()} (general.license)"
    dtypes = _counted(tensor.tensor_type.name for tensor in reader.tensors)
    return WeightFiles("GGUF", os.path.getsize(path), dtypes, licence)


def _read_folder(folder: Path) -> WeightFiles:
    if (folder / ".metadata").is_file():
        kind, files, dtypes = "DCP", [*folder.rglob("*.distcp"), folder / ".metadata"], _dcp_dtypes(folder)
    else:
        kind, files = "safetensors", sorted(folder.glob("*.safetensors"))
        dtypes = [dtype for file in files for dtype in _safetensors_dtypes(file)]
    num_bytes = sum(file.stat().st_size for file in files)
    return WeightFiles(kind, num_bytes, _counted(dtypes), _folder_licence(folder))


def _folder_licence(folder: Path) -> str:
    readme = folder / "README.md"
    if readme.is_file() and (licence := _front_matter_licence(readme)):
        return f"{licence} (README.md)"
    config_file = folder / "config.json"
    if config_file.is_file():
        content = json.loads(config_file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("license"), str):
            return f"{content['license']} (config.json)"
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().startswith(("license", "licence")))
    return f"see {files[0]} there" if files else _NOT_STATED


def _counted(dtypes: Iterable[str]) -> dict[str, int]:
    return dict(Counter(dtypes).most_common())


def _safetensors_dtypes(file: Path) -> list[str]:
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]


def _dcp_dtypes(path: Path) -> list[str]:
    metadata = dcp_files.open_checkpoint(str(path)).read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in metadata if isinstance(entry, TensorStorageMetadata)]
    return [str(entry.properties.dtype).removeprefix("torch.") for entry in tensors]


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
