"""A teacher in Hugging Face format, in a folder or on the hub: its configuration, files and tokenizer.

Safetensors only, and only a checkpoint that holds every weight: a newly initialised weight is an error. What is made of
them is in `hf_trunk.py`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher import quantization
from let_plugin.teacher.base import LanguageModel, TeacherSource
from let_plugin.teacher.hf import weights as hf_weights
from let_plugin.teacher.hf.checks import check_folder, remote_code_problem
from let_plugin.teacher.hf.safetensors_files import INDEX
from let_plugin.teacher.hf.trunk import (
    HFTeacher,
    import_transformers,
    make_language_model,
    make_teacher,
    make_whole_trunk,
    teacher_info,
)
from let_plugin.tokens.vocabulary import open_tokenizer

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer
    from transformers import PreTrainedConfig

_PATH_KEY = "let.teacher.path"
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILES = ["config.json", "model*.safetensors", INDEX]


class HFTeacherSource(TeacherSource):
    """A `transformers` decoder in a local folder (config.json + safetensors, sharded or not), or on the hub.

    Args:
        config: The `[let.teacher]` table. `path` is a hub name only if it looks like one ("org/name") and there is no
            such path on this machine. A local teacher never touches the network.

    Raises:
        ConfigError: If there is no such teacher, it is not a decoder that can be a teacher, or the headers of a local
            teacher's files do not fit its configuration.
    """

    def __init__(self, config: TeacherConfig) -> None:
        import_transformers()
        quantization.check(config)
        self._teacher_config = config
        self._is_local = os.path.exists(config.path)
        if self._is_local:
            check_folder(config)
        elif not _HUB_NAME.match(config.path):
            message = 'there is no such folder, and it is not a hub name ("org/name"); give a folder with config.json'
            raise ConfigError(Problem(_PATH_KEY, f"{message} and *.safetensors", config.path))
        self._model_config = self._load_config()
        where = "folder" if self._is_local else "hub"
        self._whole_trunk = make_whole_trunk(self._model_config, config)
        self.info = teacher_info(self._whole_trunk, f"{where} {config.path}")
        self._fit: hf_weights.Fit | None = None
        if self._is_local:
            self._fit = self._check_fit(config.path)

    def tokenizer(self) -> Any | None:
        return open_tokenizer(self._teacher_config)

    def build(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: "Trainer.Config",
        parallel_dims: "ParallelDims",
        layers: Sequence[int | str],
        final_norm: bool,
    ) -> "HFTeacher":
        """See TeacherSource. No rank holds more of the teacher than its shard: see `hf_weights.py`."""
        if self._fit is None:
            self._fit = self._check_fit(self._download())
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

    def _check_fit(self, folder: str) -> hf_weights.Fit:
        fit = hf_weights.fit_safetensors(Path(folder), self._whole_trunk)
        fit.check(self._whole_trunk, self.info.num_layers, self._teacher_config.path)
        return fit

    def _download(self) -> str:
        """The folder on this machine with the files of a hub name. They are fetched where they are not there yet."""
        from huggingface_hub import snapshot_download

        path = self._teacher_config.path
        try:
            return snapshot_download(path, allow_patterns=_HUB_FILES)
        except Exception as error:  # OSError, ValueError and the hub client's own
            raise ConfigError(Problem(_PATH_KEY, f"it cannot be fetched from the hub: {error}", path)) from error

    def language_model(self, *, dtype: torch.dtype, device: torch.device, seq_len: int) -> LanguageModel:
        folder = Path(self._teacher_config.path if self._is_local else self._download())
        return make_language_model(
            self._model_config,
            self._teacher_config,
            lambda model: hf_weights.fit_safetensors(folder, model),
            num_layers=self.info.num_layers,
            dtype=dtype,
            device=device,
        )

    def _load_config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        path = self._teacher_config.path
        try:
            return AutoConfig.from_pretrained(
                path, local_files_only=self._is_local, trust_remote_code=self._teacher_config.trust_remote_code
            )
        except Exception as error:  # OSError, ValueError, JSON and hub errors, and whatever remote code raises
            if "trust_remote_code" in str(error):
                raise ConfigError(remote_code_problem()) from error
            remedy = "" if self._is_local else " (no local folder of that name either)"
            raise ConfigError(Problem(_PATH_KEY, f"its configuration cannot be read{remedy}: {error}", path)) from error
