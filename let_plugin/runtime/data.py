"""Text for torchtitan's data loader: entries of its own table of datasets. Cheap to import."""

import glob
import os
from functools import partial
from importlib.resources import files
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from let_plugin.config.errors import ConfigError, Problem

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# The embedded default (`let_plugin.demo`): English text, a tokenizer, and a small teacher pretrained on that text.
ASSETS = str(files("let_plugin") / "demo" / "assets")
TOKENIZER = f"{ASSETS}/tokenizer"
TEACHER = f"{ASSETS}/teacher"
TEXT = {split: f"{ASSETS}/text.{split}.jsonl.xz" for split in ("train", "validation", "test")}

# File name ending -> loader of the `datasets` library. Compressed files (.gz, .xz, .zst) are read as they are.
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSIONS = (".gz", ".xz", ".zst")

# The Pile's own host has taken it down. This copy leaves out the five parts that are not free to use (Books3,
# BookCorpus2, OpenSubtitles, YouTube subtitles, OpenWebText2); its documents are shuffled.
PILE = "monology/pile-uncopyrighted"
_PILE_FILES = {"train": "train/*.jsonl.zst", "validation": "val.jsonl.zst"}


def register() -> None:
    """Adds "text_files", the demo's splits and The Pile's to torchtitan's datasets. Safe to call again."""
    from let_plugin.runtime.upstream import DATASETS, DatasetConfig

    places: dict[str, tuple[str, Any]] = {"text_files": ("", load_text_files)}
    places |= {f"let_demo_{split}": (path, load_text_files) for split, path in TEXT.items()}
    places |= {f"pile_{split}": (PILE, partial(_stream_pile, split)) for split in _PILE_FILES}
    for name, (path, loader) in places.items():
        DATASETS[name] = DatasetConfig(path=path, loader=loader, sample_processor=itemgetter("text"))


def _stream_pile(split: str, path: str) -> "IterableDataset":
    """Streams a split of The Pile from `path`: its name on the hub, or a folder with the files of `_PILE_FILES`."""
    from datasets import load_dataset

    try:
        return load_dataset(path, data_files={split: _PILE_FILES[split]}, split=split, streaming=True)
    except Exception as error:  # the hub client, fsspec and datasets each have types of their own
        message = f"no {_PILE_FILES[split]} can be read there: {error}. Without a network, give a folder that has them"
        raise ConfigError(Problem("dataloader.dataset_path", message, path)) from error


def load_text_files(path: str, *, key: str = "dataloader.dataset_path") -> "Dataset":
    """Text documents: one file, a glob, or a folder of .jsonl, .json, .parquet (field "text") or .txt (lines).

    ConfigError, naming the field `key`, if there is nothing there or the ending is unknown.
    """
    from datasets import load_dataset

    found = find_text_files(path, key=key)
    files = [glob.escape(file) for file in found]  # the library takes file names for patterns
    try:
        dataset = load_dataset(_loader(found[0]), data_files=files, split="train")
    except Exception as error:  # the library has types of its own for a damaged file
        message = f"cannot be read: {error.__cause__ or error}"
        raise ConfigError(Problem(key, message, path)) from error
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        message = f'the documents have no field "text", only {columns}'
        raise ConfigError(Problem(key, message, path))
    return dataset


def find_text_files(path: str, *, key: str) -> list[str]:
    """The files, all of one kind, that `path` stands for. ConfigError, naming the field `key`, if there are none."""
    if os.path.isdir(path):
        pattern = os.path.join(glob.escape(path), "*")
    else:
        pattern = glob.escape(path) if os.path.exists(path) else path
    found = sorted(f for f in glob.glob(pattern) if os.path.isfile(f))
    if not found:
        raise ConfigError(Problem(key, "no such file; give a file, a folder or a glob pattern", path))
    loaders = {_loader(f) for f in found}
    if len(loaders) > 1 or None in loaders:
        raise ConfigError(Problem(key, f"expected files of one kind out of {', '.join(_LOADERS)}", path))
    return found


def _loader(file: str) -> str | None:
    stem, ending = os.path.splitext(file)
    if ending in _COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    return _LOADERS.get(ending)
