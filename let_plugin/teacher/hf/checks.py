"""What can be wrong with a checkpoint that `transformers` is to read: found here, and said in one ConfigError.

In the order in which they are asked: the folder, then the architecture. `safetensors_files.py` checks the weight files,
`hf_weights.py` how they fit, `hf_trials.py` how the teacher runs.
"""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.hf.safetensors_files import INDEX, SINGLE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PATH_KEY = "let.teacher.path"
_LAYER_TYPES = {"full_attention", "sliding_attention"}  # as `transformers` names them
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def check_folder(config: TeacherConfig) -> None:
    """ConfigError unless `config.path` is a folder with a config.json and safetensors that can be used."""
    folder = Path(config.path)
    if not folder.is_dir():
        message = "not a folder; give the folder with config.json and *.safetensors (or a .gguf file)"
        raise ConfigError(Problem(_PATH_KEY, message, config.path))
    problems = []
    config_file = folder / "config.json"
    if not config_file.is_file():
        message = "no config.json in this folder; a teacher needs config.json and *.safetensors, as save_pretrained"
        problems.append(Problem(_PATH_KEY, f"{message} writes them", config.path))
    else:
        problems += _config_file_problems(config_file, config)
    if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX).is_file():
        if any(file.suffix in _PICKLE_SUFFIXES for file in folder.iterdir()):
            message = (
                "only pickled weights there, which can run code when they are read and are refused; convert them, "
                "where you trust them: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
            )
        else:
            message = f"no {SINGLE_FILE} (or {INDEX}) in this folder"
        problems.append(Problem(_PATH_KEY, message, config.path))
    if problems:
        raise ConfigError(problems)


def check_is_decoder(config: "PreTrainedConfig", teacher_config: TeacherConfig) -> None:
    """ConfigError if `config` does not describe a text decoder with unquantised weights."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    model_type = config.model_type
    if config.is_encoder_decoder:
        message = f"{model_type} is an encoder-decoder"
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        message = f"{model_type} is an encoder: its tokens see their future"
    elif config.get_text_config(decoder=True) is not config:
        message = f"{model_type} is a multimodal model; save its text model by itself"
    elif model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not teacher_config.trust_remote_code:
        message = f"{model_type} is not a causal language model"
    elif getattr(config, "quantization_config", None) is not None:
        message = "its weights are quantised; give a checkpoint in bfloat16 or float32, or a .gguf file"
    else:
        return
    raise ConfigError(Problem(_PATH_KEY, f"a teacher is a text decoder: {message}", teacher_config.path))


def check_isolates_documents(config: "PreTrainedConfig", trunk: nn.Module, path: str) -> None:
    """ConfigError for what can be told from the model's class and configuration; `hf_trials` does the rest."""
    family = config.model_type
    layer_types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    reason = ""
    if layer_types:
        reason = f"it has layers of type {', '.join(sorted(layer_types))}"
    elif getattr(trunk, "_is_stateful", False):
        reason = "it is recurrent"
    elif not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        reason = "its attention is not causal"
    elif not getattr(trunk, "_supports_attention_backend", False):
        reason = "its attention in transformers cannot be told where a document ends"
    elif not trunk._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None:
        reason = "its attention needs what SDPA cannot do"  # soft-capped scores (Gemma 2) are done without SDPA
    elif "position_ids" not in inspect.signature(trunk.forward).parameters:
        reason = "it takes no position_ids"
    if reason:
        message = f"packed documents cannot be kept apart in the family {family}: {reason}; choose another teacher"
        raise ConfigError(Problem(_PATH_KEY, message, path))
    try:
        find_layers(trunk, config.num_hidden_layers)
    except ValueError as error:
        raise ConfigError(Problem(_PATH_KEY, str(error), path)) from error


def find_layers(trunk: nn.Module, num_layers: int) -> nn.ModuleList:
    """The outermost ModuleList with as many entries as the model has layers; ValueError if there is none."""
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(trunk).__name__} has no list of {num_layers} layers")


def remote_code_problem() -> Problem:
    message = (
        "the checkpoint comes with Python code of its own; set it to true if you trust that code, or choose a teacher "
        "that transformers knows"
    )
    return Problem("let.teacher.trust_remote_code", message, False)


def _config_file_problems(config_file: Path, config: TeacherConfig) -> list[Problem]:
    from transformers import CONFIG_MAPPING

    try:
        content = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [Problem(_PATH_KEY, f"its config.json cannot be read: {error}", config.path)]
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type in CONFIG_MAPPING:
        return []
    if isinstance(content, dict) and "auto_map" in content:
        return [] if config.trust_remote_code else [remote_code_problem()]
    message = f"transformers knows no model_type {model_type!r} (in config.json); a newer transformers may"
    return [Problem(_PATH_KEY, message, config.path)]
