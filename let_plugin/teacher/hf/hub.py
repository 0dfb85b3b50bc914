"""Teachers on the Hugging Face hub.

At start-up everything but the weights is fetched, and the headers of the weight files: enough to check a teacher. Its
weights are fetched when it is built, at the same commit.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import TensorInfo

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.hf.files import INDEX, SINGLE_FILE, missing_files

_PATH_KEY = "let.teacher.path"
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_TIMEOUT = 6.0  # seconds until the hub counts as unreachable
_MIB = 2**20


@dataclass(frozen=True)
class HubCheckpoint:
    """A repository on the hub, at one commit."""

    # A local folder with its small files and its weight files. If the weights were not in the cache, these are empty
    # files of the right size behind the right headers.
    folder: str
    commit: str = ""  # empty if it was found in the cache alone
    size: str = "in the cache"  # of the weights, for people
    temporary: "TemporaryDirectory[str] | None" = None  # what `folder` is in, if it goes away with this object


def open_hub(config: TeacherConfig) -> HubCheckpoint:
    """Looks a hub name up, at `let.teacher.revision`. ConfigError if it cannot be had or has no safetensors."""
    patterns = [*_SMALL_FILES, *(["*.py"] if config.trust_remote_code else [])]
    revision = config.revision or None
    if constants.HF_HUB_OFFLINE:
        return _cached(config, patterns, "HF_HUB_OFFLINE is set")
    api = HfApi()
    try:
        with _quiet():
            info = api.model_info(config.path, revision=revision, files_metadata=True, timeout=_TIMEOUT)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
            if problems := missing_files(sizes, config):
                raise ConfigError(problems)
            small = snapshot_download(config.path, revision=info.sha, allow_patterns=patterns)
            names = [SINGLE_FILE] if SINGLE_FILE in sizes else _indexed(Path(small), sizes)
            temporary = TemporaryDirectory(prefix="let_plugin_hub_")
            for file in Path(small).rglob("*"):
                if file.is_file() and file.suffix != ".safetensors":
                    _link(Path(temporary.name, file.relative_to(small)), file)
            for name in names:
                header = api.parse_safetensors_file_metadata(config.path, name, revision=info.sha, timeout=_TIMEOUT)
                _write_header(Path(temporary.name, name), header.tensors)
    except ConfigError:
        raise
    except HfHubHTTPError as error:  # it was reached, and said no
        message = f"the hub refuses it: {str(error).splitlines()[0]} (no local folder of that name either)"
        raise ConfigError(Problem(_PATH_KEY, message, _named(config))) from error
    except Exception as error:  # no network: of the HTTP library's many types
        return _cached(config, patterns, f"the hub cannot be reached or read ({type(error).__name__})")
    num_bytes = sum(sizes.get(name, 0) for name in names)
    size = f"{len(names)} file{'s' if len(names) > 1 else ''}, {num_bytes / _MIB:,.1f} MiB"
    return HubCheckpoint(temporary.name, info.sha or "", size, temporary)


def fetch_weights(config: TeacherConfig, checkpoint: HubCheckpoint) -> str:
    """The folder, in the hub client's cache, with all files of a checkpoint; they are fetched if they are not there."""
    if checkpoint.temporary is None:
        return checkpoint.folder
    try:
        patterns = [*_SMALL_FILES, *_WEIGHTS, *(["*.py"] if config.trust_remote_code else [])]
        return snapshot_download(config.path, revision=checkpoint.commit, allow_patterns=patterns)
    except Exception as error:  # OSError, ValueError and the hub client's own
        message = f"its weights cannot be fetched from the hub: {error}"
        raise ConfigError(Problem(_PATH_KEY, message, _named(config))) from error


def _cached(config: TeacherConfig, patterns: list[str], reason: str) -> HubCheckpoint:
    try:
        folder = snapshot_download(
            config.path, revision=config.revision or None, allow_patterns=[*patterns, *_WEIGHTS], local_files_only=True
        )
    except Exception as error:
        message = f"{reason}, and it is not in the hub client's cache (no local folder of that name either)"
        raise ConfigError(Problem(_PATH_KEY, message, _named(config))) from error
    return HubCheckpoint(folder)


def _indexed(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """The files that the index names and the repository has; what is wrong with the others shows when they are read."""
    names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(name for name in names & sizes.keys() if ".." not in Path(name).parts)


def _link(link: Path, file: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(file.resolve(), link)


def _write_header(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """A safetensors file with these tensors and no data: a hole of the right size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = {n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets} for n, t in tensors.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with open(file, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + max((t.data_offsets[1] for t in tensors.values()), default=0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's messages about its retries."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _named(config: TeacherConfig) -> str:
    return f"{config.path}@{config.revision}" if config.revision else config.path
