"""A teacher in a .gguf file, which is dequantised (see `gguf_weights.py`), and that file's tokenizer.

`python -m let_plugin.teacher.hf.gguf FILE.gguf --tokenizer OUT_DIR` writes the tokenizer in the form that torchtitan
reads, so that a student can be trained on it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher import quantization
from let_plugin.teacher.base import LanguageModel, TeacherSource
from let_plugin.teacher.hf.gguf_weights import cut_tensors, fit_gguf
from let_plugin.teacher.hf.safetensors_files import some_names
from let_plugin.teacher.hf.trunk import (
    HFTeacher,
    import_transformers,
    make_language_model,
    make_teacher,
    make_whole_trunk,
    quiet_transformers,
    teacher_info,
)
from let_plugin.teacher.hf.weights import Fit
from let_plugin.tokens.vocabulary import open_tokenizer

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer

_PATH_KEY = "let.teacher.path"
_MAGIC = b"GGUF"


class GGUFTeacherSource(TeacherSource):
    """The trunk of a decoder in a .gguf file.

    Args:
        config: The `[let.teacher]` table; `path` is the file.

    Raises:
        ConfigError: If the file is missing, truncated or not GGUF, if a package is missing, or if the model cannot be
            a teacher.
    """

    def __init__(self, config: TeacherConfig) -> None:
        _check_packages()
        quantization.check(config)
        _check_file(config.path)
        self._teacher_config = config
        self._model_config = _read(config.path, "configuration", _load_config)
        trunk = make_whole_trunk(self._model_config, config)
        self.info = teacher_info(trunk, f"GGUF {config.path}")
        self._fit = _read(config.path, "weights", lambda folder, name: fit_gguf(os.path.realpath(config.path), trunk))
        self._fit.check(trunk, self.info.num_layers, config.path)

    def tokenizer(self) -> Any:
        """From `tokenizer_path` if given, or else the file's own."""
        if self._teacher_config.tokenizer_path:
            return open_tokenizer(self._teacher_config)
        return _read(self._teacher_config.path, "tokenizer", _load_tokenizer)

    def build(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: "Trainer.Config",
        parallel_dims: "ParallelDims",
        layers: Sequence[int | str],
        final_norm: bool,
    ) -> HFTeacher:
        """See TeacherSource. One tensor of the file at a time is dequantised whole, by every rank, in CPU memory."""
        return make_teacher(
            self._model_config,
            self.info,
            self._fit.steps,
            config=self._teacher_config,
            dtype=dtype,
            device=device,
            parallel_dims=parallel_dims,
            layers=layers,
            final_norm=final_norm,
        )

    def language_model(self, *, dtype: torch.dtype, device: torch.device, seq_len: int) -> LanguageModel:
        path = self._teacher_config.path

        def fit(model: Any) -> Fit:
            return _read(path, "weights", lambda folder, name: fit_gguf(os.path.realpath(path), model))

        return make_language_model(
            self._model_config, self._teacher_config, fit, num_layers=self.info.num_layers, dtype=dtype, device=device
        )


def write_tokenizer(gguf_file: str, folder: str) -> None:
    """Writes the tokenizer of a .gguf file as tokenizer.json and tokenizer_config.json into `folder`.

    ConfigError if there is none, or it has no end-of-sequence token: torchtitan puts one between documents.
    """
    tokenizer = load_tokenizer(gguf_file)
    if tokenizer.eos_token is None:
        raise ConfigError(Problem(_PATH_KEY, "its tokenizer has no end-of-sequence token", gguf_file))
    tokenizer.save_pretrained(folder)


def load_tokenizer(gguf_file: str) -> Any:
    """The tokenizer of a .gguf file, as `transformers` makes it. ConfigError if there is none."""
    _check_packages()
    _check_file(gguf_file)
    return _read(gguf_file, "tokenizer", _load_tokenizer)


def _check_packages() -> None:
    import_transformers()
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            message = f"a .gguf teacher needs the {package} package: pip install let-plugin[hf]"
            raise ConfigError(Problem(_PATH_KEY, message))


def _check_file(path: str) -> None:
    """ConfigError if the file is missing, is not GGUF, or ends before its last tensor does."""
    if not os.path.isfile(path):
        raise ConfigError(Problem(_PATH_KEY, "there is no such file; give the path of a .gguf file", path))
    with open(path, "rb") as f:
        if f.read(len(_MAGIC)) != _MAGIC:
            raise ConfigError(Problem(_PATH_KEY, "not a GGUF file (it does not start with 'GGUF')", path))


def _read(path: str, what: str, load: Any) -> Any:
    """`load(folder, file name)`; ConfigError for whatever goes wrong in it."""
    path, name = os.path.abspath(path), os.path.basename(path)
    try:
        # Alone in a folder: transformers would prefer a tokenizer_config.json or config.json that lies beside it.
        with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
            os.symlink(path, os.path.join(folder, name))
            return load(folder, name)
    except Exception as error:  # a damaged file fails in numpy, struct or the reader: any type of error
        size = os.path.getsize(path)
        if cut := cut_tensors(path):
            message = f"the file is truncated ({size} bytes): it lacks (part of) {some_names(cut)}; fetch it again"
        else:
            message = f"its {what} cannot be read: the file is truncated ({size} bytes), damaged or of an unknown kind"
            message = f"{message}; {type(error).__name__}: {error}"
        raise ConfigError(Problem(_PATH_KEY, message, path)) from error


def _load_config(folder: str, name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)


def _load_tokenizer(folder: str, name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m let_plugin.teacher.gguf", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE.gguf", help="the .gguf file")
    parser.add_argument("--tokenizer", metavar="OUT_DIR", required=True, help="folder to write its tokenizer to")
    options = parser.parse_args(arguments)
    try:
        write_tokenizer(options.file, options.tokenizer)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {Path(options.tokenizer) / 'tokenizer.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
