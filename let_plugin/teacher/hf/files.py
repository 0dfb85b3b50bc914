"""The files of a checkpoint in Hugging Face format: which ones make it up, what their headers say, what is wrong."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from let_plugin.config.errors import Problem, raise_if_any
from let_plugin.teacher.base import bad_path

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_MAX_NAMED = 8


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]
    is_floating: bool


def check_names(names: Iterable[str], path: str) -> None:
    """ConfigError for what is wrong with the checkpoint at `path`, by the names of its files alone."""
    names, messages = set(names), []
    if "adapter_config.json" in names:
        message = (
            "it is an adapter (PEFT), not a whole model; merge it into its base model: "
            "AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload().save_pretrained(new_path)"
        )
        raise bad_path(path, message)
    if "config.json" not in names:
        messages.append("no config.json there; a teacher needs it and *.safetensors, as save_pretrained writes")
    if not {SINGLE_FILE, INDEX} & names:
        message = f"no {SINGLE_FILE} (or {INDEX}) there"
        if any(Path(name).suffix in PICKLE_SUFFIXES for name in names):
            message = (
                "only pickled weights there, which can run code when they are read, and are refused; convert them, if "
                "you trust them: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path). If a revision "
                "on the hub has safetensors, name it in let.teacher.revision"
            )
        messages.append(message)
    if messages:
        raise bad_path(path, *messages)


def weight_files(folder: Path, *, any_name: bool = False) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or else those that the index names.

    With `any_name`, if there is neither, all *.safetensors in the folder. ConfigError if the index cannot be read, or
    names files that are not there or outside the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if any_name and not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        files = {name: folder / name for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_path(str(folder), f"its {INDEX} cannot be read: {error!r}") from error
    # A file may be a link to anywhere (the hub's cache has such links), but not lie in another folder by its name.
    root = folder.resolve()
    if outside := [name for name, file in files.items() if not file.parent.resolve().is_relative_to(root)]:
        message = f"its {INDEX} names files outside the folder: {some_names(outside)}"
    elif absent := [name for name, file in files.items() if not file.is_file()]:
        message = f"its {INDEX} names files that are not there: {some_names(absent)}; fetch them, or delete the index"
    else:
        return list(files.values())
    raise bad_path(str(folder), message)


def linked(files: Iterable[Path]) -> "TemporaryDirectory[str]":
    """A folder with links to these files alone."""
    folder = TemporaryDirectory(prefix="let_plugin_files_")
    for i, file in enumerate(files):
        os.symlink(file.resolve(), Path(folder.name, f"{i:05d}-{file.name}"))
    return folder


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Name -> tensor, of all the files. ConfigError that names files that are missing, truncated or damaged."""
    tensors: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    stored = opened.get_slice(name)
                    # F32, BF16, F8_E4M3 and so on; I64, U8, BOOL
                    tensors[name] = StoredTensor(tuple(stored.get_shape()), "F" in stored.get_dtype())
        except (OSError, SafetensorError) as error:
            message = f"{file.name} is truncated or not a safetensors file: {error}; fetch it again"
            problems += bad_path(str(file.parent), message).problems
    raise_if_any(problems)
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """ConfigError that names those of a checkpoint's tensors, or of a rank's shards of them, that are not finite."""
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    not_finite = [name for name, t in local.items() if t.is_floating_point() and not t.isfinite().all()]
    if not_finite:
        message = f"these tensors hold NaN or infinite values: {some_names(not_finite)}; fetch the files again"
        raise bad_path(path, message)


def some_names(names: Iterable[str]) -> str:
    """The first few of them, for a message."""
    names = sorted(names)
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
