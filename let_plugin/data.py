"""Local text for torchtitan's data loader: entries of its own table of datasets."""

import glob
import os
from typing import Any

from datasets import Dataset, load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from let_plugin.demo import TEXT
from let_plugin.errors import ConfigError, Problem

# File name ending -> loader of the `datasets` library. Compressed files (.gz, .xz, .zst) are read as they are.
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSIONS = (".gz", ".xz", ".zst")


def register() -> None:
    """Adds "text_files" and the demo's splits to torchtitan's datasets. Safe to call again."""
    DATASETS["text_files"] = DatasetConfig(path="", loader=load_text_files, sample_processor=_text)
    for split, path in TEXT.items():
        DATASETS[f"let_demo_{split}"] = DatasetConfig(path=path, loader=load_text_files, sample_processor=_text)


def load_text_files(path: str) -> Dataset:
    """Loads text documents: one file, a glob, or a folder of .jsonl, .json, .parquet (field "text") or .txt (lines).

    ConfigError if there is nothing there or the ending is unknown.
    """
    files = find_text_files(path, key="dataloader.dataset_path")
    # The library takes its files for patterns.
    dataset = load_dataset(_loader(files[0]), data_files=[glob.escape(f) for f in files], split="train")
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        message = f'the documents have no field "text", only {columns}'
        raise ConfigError(Problem("dataloader.dataset_path", message, path))
    return dataset


def find_text_files(path: str, *, key: str) -> list[str]:
    """The files, all of one kind, that `path` stands for. ConfigError, naming the field `key`, if there are none."""
    if os.path.isdir(path):
        pattern = os.path.join(glob.escape(path), "*")
    else:
        pattern = glob.escape(path) if os.path.exists(path) else path
    files = sorted(f for f in glob.glob(pattern) if os.path.isfile(f))
    if not files:
        raise ConfigError(Problem(key, "no such file; give a file, a folder or a glob pattern", path))
    loaders = {_loader(f) for f in files}
    if len(loaders) > 1 or None in loaders:
        raise ConfigError(Problem(key, f"expected files of one kind out of {', '.join(_LOADERS)}", path))
    return files


def _loader(file: str) -> str | None:
    stem, ending = os.path.splitext(file)
    if ending in _COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    return _LOADERS.get(ending)


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]
