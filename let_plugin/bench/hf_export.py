"""A torchtitan checkpoint as a folder that `transformers` opens: config.json, model.safetensors, the tokenizer's files.

For models of torchtitan's llama3 type, which are transformers' LlamaForCausalLM.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torchtitan.models.llama3 import Llama3Model
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import dcp_files

_HEAD = "lm_head.weight"
_ROPE_TYPES = {"none": "default", "llama": "llama3"}
_TOKENIZER = "tokenizer.json"
# Beside it, where they are: special tokens, and how text is cleaned up.
_TOKENIZER_FILES = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def export(config: Trainer.Config, checkpoint: str, out: Path) -> None:
    """Writes the model of a checkpoint into the folder `out`, in the checkpoint's dtype.

    Args:
        config: What the checkpoint was trained with; its `hf_assets_path` is the tokenizer.
        checkpoint: Folder of a torchtitan checkpoint (DCP). What else than the model is in it is left out.
        out: A folder that is empty or not there yet.

    Raises:
        ConfigError: If transformers is not installed, the model is of another family, the checkpoint is not of this
            model, the tokenizer has no tokenizer.json, or `out` is not empty. Nothing has been written then.
    """
    spec = config.model_spec
    assert spec is not None
    problems = []
    if find_spec("transformers") is None:
        problems.append(Problem("let-bench eval", 'needs transformers; pip install "let-plugin[eval]"'))
    tokenizer = Path(config.hf_assets_path)
    if not (tokenizer / _TOKENIZER).is_file():
        message = f"has no {_TOKENIZER}; an exported model needs one"
        problems.append(Problem("hf_assets_path", message, config.hf_assets_path))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(Problem("--export", "is there already; give a new folder", str(out)))
    if problems:
        raise ConfigError(problems)
    described = hf_config(spec)
    weights = _weights(config, checkpoint)
    adapter = Llama3StateDictAdapter(spec.model, hf_assets_path=None)
    exported = {name: weight.contiguous() for name, weight in adapter.to_hf(weights).items()}
    _check_complete(described, exported)
    described.dtype = next(iter(exported.values())).dtype

    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    described.save_pretrained(out)
    save_file(exported, out / "model.safetensors", metadata={"format": "pt"})
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)
    if not (out / "tokenizer_config.json").exists():
        # Else transformers would take the class that goes with a llama model, which reads some files in its own way.
        (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")


def hf_config(spec: ModelSpec) -> Any:
    """transformers' LlamaConfig of a torchtitan model. ConfigError if it is of another family."""
    from transformers import LlamaConfig

    model: Any = spec.model
    problems = []
    if not isinstance(model, Llama3Model.Config) or spec.state_dict_adapter is not Llama3StateDictAdapter:
        message = "only models of torchtitan's llama3 type can be exported to transformers"
        raise ConfigError(Problem("model_spec", message, spec.name))
    attention: Any = model.first_attention
    rope = attention.rope
    if rope.scaling not in _ROPE_TYPES:
        problems.append(Problem("model_spec", "its rotary embedding's scaling cannot be exported", rope.scaling))
    if getattr(attention, "qk_norm", None) is not None:
        problems.append(Problem("model_spec", "transformers' llama has no norm of queries and keys", spec.flavor))
    if problems:
        raise ConfigError(problems)
    rope_parameters = {"rope_type": _ROPE_TYPES[rope.scaling], "rope_theta": rope.theta}
    if rope.scaling == "llama":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope_parameters |= {"factor": rope.scaling_factor} | {name: getattr(rope, name) for name in names}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.layers[0].feed_forward.w1.out_features,
        num_hidden_layers=len(model.layers),
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads or attention.n_heads,
        head_dim=rope.dim,
        hidden_act="silu",
        rms_norm_eps=model.norm.eps,
        max_position_embeddings=rope.max_seq_len,
        tie_word_embeddings=model.enable_weight_tying,
        rope_parameters=rope_parameters,
        bos_token_id=None,  # the tokenizer's files say it
        eos_token_id=None,
    )


def _weights(config: Trainer.Config, checkpoint: str) -> dict[str, torch.Tensor]:
    """The model's tensors out of the checkpoint. ConfigError lists those that are missing or of another shape."""
    model_config: Any = config.model_spec.model
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in model_config.build().state_dict().items()}
    try:
        reader = dcp_files.open_checkpoint(checkpoint)
        metadata: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:  # a missing folder, a damaged file: DCP has many ways to say so
        raise ConfigError(Problem("CHECKPOINT", f"not a checkpoint of torchtitan: {error}", checkpoint)) from error
    if model_config.enable_weight_tying and _HEAD not in metadata:
        del shapes[_HEAD]
    problems = []
    for name, shape in shapes.items():
        found = getattr(metadata.get(name), "size", None)
        if found != shape:
            is_ = "is not in it" if found is None else f"has the shape {tuple(found)} in it"
            message = f"{name} {is_}, and {tuple(shape)} in the configuration; give the one that it was trained with"
            problems.append(Problem("CHECKPOINT", message, checkpoint))
    if problems:
        raise ConfigError(problems)
    weights = {name: torch.empty(shape, dtype=metadata[name].properties.dtype) for name, shape in shapes.items()}
    dcp_files.load(weights, reader)
    return weights


def _check_complete(described: Any, exported: dict[str, torch.Tensor]) -> None:
    """ConfigError unless transformers' model of that configuration has these tensors, all of them and no other."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in LlamaForCausalLM(described).state_dict().items()}
    if described.tie_word_embeddings:
        del expected[_HEAD]
    found = {name: tensor.shape for name, tensor in exported.items()}
    if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        message = f"has parameters that transformers' llama has not, or the reverse: {', '.join(different[:4])}"
        raise ConfigError(Problem("model_spec", message))
