"""What stored states depend on, as short texts that can be compared: the teacher, the tokenizer, the data.

They are of contents, not of places: a folder may be moved.
"""

import dataclasses
import glob
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torchtitan.trainer import Trainer

from let_plugin.config import TeacherConfig, plan
from let_plugin.runtime import data
from let_plugin.runtime.upstream import DATASETS

_TEACHER_ENDINGS = (".safetensors", ".gguf", ".distcp", ".metadata")
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
_TOKENIZER_FILES |= {"vocab.json", "vocab.txt", "merges.txt"}
# How the loader's workers share the work, not what the rows are.
_WORKER_FIELDS = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor"}
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def teacher(config: TeacherConfig) -> str:
    """Of the teacher's weights and configuration.

    Of each file with weights: its size and 16 samples of 64 KiB, evenly spread, the first and the last among them. Of a
    hub name: the name and the revision that is in the cache. Of another place that is not on this machine: its name.
    Empty if no weights are named.
    """
    from let_plugin.teacher.titan.source import TRANSFORMERS, with_spec_paths

    path = config.path if config.spec in ("", TRANSFORMERS) else with_spec_paths(config).path
    if not path:
        return ""
    if os.path.isfile(path):
        return _digest([Path(path)])
    if not os.path.isdir(path):
        try:
            cached = try_to_load_from_cache(path, "config.json", revision=config.revision or None)
        except ValueError:  # no hub name at all
            cached = None
        return f"{path}@{Path(cached).parent.name if isinstance(cached, str) else 'unknown'}"
    files = sorted(f for f in Path(path).rglob("*") if f.name.endswith(_TEACHER_ENDINGS) or f.name == "config.json")
    return _digest(files)


def tokenizer(folder: str) -> str:
    """Of the tokenizer's files in a folder."""
    paths = sorted(Path(folder).glob("*"))
    return _digest([path for path in paths if path.name in _TOKENIZER_FILES or path.suffix == ".tiktoken"])


def run(config: Trainer.Config) -> dict[str, Any]:
    """The keys of a run that decide which states it needs, and their values: JSON values."""
    values = {
        "training.seq_len": config.training.seq_len,
        "hf_assets_path": tokenizer(config.hf_assets_path),
        "let.teacher.dtype": str(plan.teacher_dtype(config)).removeprefix("torch."),
        "let.teacher.final_norm": config.let.teacher.final_norm,
    }
    values |= {f"let.token_alignment.{name}": v for name, v in dataclasses.asdict(config.let.token_alignment).items()}
    return values | {f"dataloader.{name}": value for name, value in loader(config).items()}


def loader(config: Trainer.Config) -> dict[str, Any]:
    """The data loader's options, those that decide which rows it yields; local files by their names and sizes.

    (That their text is the same shows in the rows themselves.)
    """
    options: dict[str, Any] = json.loads(json.dumps(config.dataloader.to_dict(), default=str))
    kind = type(config.dataloader).__qualname__.removesuffix(".Config")
    return {"type": kind, **_without_places(options)}


def _without_places(options: Any) -> Any:
    if isinstance(options, list):
        return [_without_places(option) for option in options]
    if not isinstance(options, dict):
        return options
    result = {name: _without_places(value) for name, value in options.items() if name not in _WORKER_FIELDS}
    if isinstance(options.get("dataset"), str) and (files := _local_files(options["dataset"], options)):
        result["dataset_path"] = {os.path.basename(file): os.path.getsize(file) for file in files}
    return result


def _local_files(dataset: str, options: dict[str, Any]) -> list[str]:
    entry = DATASETS.get(dataset.lower())
    path = options.get("dataset_path") or (entry.path if entry else "")
    if entry and entry.loader is data.load_text_files:
        return data.find_text_files(path, key="dataloader.dataset_path")
    if path and os.path.isdir(path):
        path = os.path.join(glob.escape(path), "**")
    return sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f)) if path else []


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= _NUM_SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for i in range(_NUM_SAMPLES):
                file.seek(i * (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
