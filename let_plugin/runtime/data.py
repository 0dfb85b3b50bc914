"""Text for torchtitan's data loader: entries of its own table of datasets."""

import glob
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.demo import TEXT
from let_plugin.runtime.upstream import DATASETS, DatasetConfig

# File name ending -> loader of the `datasets` library. Compressed files (.gz, .xz, .zst) are read as they are.
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSIONS = (".gz", ".xz", ".zst")

# The Pile's own host has taken it down. This copy goes without the five parts that are not free to use (Books3,
# BookCorpus2, OpenSubtitles, YouTube subtitles, OpenWebText2); its documents are shuffled, in .jsonl.zst.
PILE = "monology/pile-uncopyrighted"
_PILE_FILES = {"train": "train/*.jsonl.zst", "validation": "val.jsonl.zst"}
_PILE_REMEDY = "Without a network, give a copy of it: the folder that has train/*.jsonl.zst and val.jsonl.zst"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+$")


def register() -> None:
    """Adds "text_files", the demo's splits and The Pile's to torchtitan's datasets. Safe to call again."""
    DATASETS["text_files"] = DatasetConfig(path="", loader=load_text_files, sample_processor=_text)
    for split, path in TEXT.items():
        DATASETS[f"let_demo_{split}"] = DatasetConfig(path=path, loader=load_text_files, sample_processor=_text)
    for split in _PILE_FILES:
        DATASETS[f"pile_{split}"] = DatasetConfig(path=PILE, loader=PileStream(split), sample_processor=_text)


@dataclass(frozen=True)
class PileStream:
    """Streams a split of The Pile: nothing is downloaded as a whole, nor written.

    Its `path` is the name of a dataset on the hub, or a folder with a copy of it (files as in `_PILE_FILES`).

    Attributes:
        split: "train" or "validation".
    """

    split: str

    def __call__(self, path: str) -> IterableDataset:
        """The documents. ConfigError if they cannot be had."""
        self.check(path, key="dataloader")
        files = _PILE_FILES[self.split]
        try:
            return load_dataset(path, data_files={self.split: files}, split=self.split, streaming=True)
        except Exception as error:  # the hub client, fsspec and datasets each have types of their own
            message = f"no {files} can be read there: {error}. {_PILE_REMEDY}"
            raise ConfigError(Problem("dataloader.dataset_path", message, path)) from error

    def check(self, path: str, *, key: str) -> None:
        """ConfigError, naming fields of the table `key`, for what can be told without the network."""
        if importlib.util.find_spec("zstandard") is None:
            message = "its files need the zstandard package: pip install let-plugin[pile]"
            raise ConfigError(Problem(f"{key}.dataset", message, f"pile_{self.split}"))
        if os.path.isdir(path):
            if not glob.glob(os.path.join(glob.escape(path), _PILE_FILES[self.split])):
                message = f"the folder has no {_PILE_FILES[self.split]}. {_PILE_REMEDY}"
                raise ConfigError(Problem(f"{key}.dataset_path", message, path))
        elif not _HUB_NAME.match(path):
            message = f'neither a folder nor a name on the hub ("org/name"). {_PILE_REMEDY}'
            raise ConfigError(Problem(f"{key}.dataset_path", message, path))


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
