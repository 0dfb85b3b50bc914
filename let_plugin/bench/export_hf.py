"""A torchtitan checkpoint of the llama3 type as a folder that `transformers` opens, as a LlamaForCausalLM."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torchtitan.models.llama3 import Llama3Model
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.runtime import dcp_files
from let_plugin.teacher.titan.spec import ROPE_SCALING, fields_of

WEIGHTS = "model.safetensors"

_TOKENIZER = "tokenizer.json"
# Copied if they are there: special tokens, and how text is cleaned up.
_TOKENIZER_FILES = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def export(config: Trainer.Config, checkpoint: str, out: Path) -> None:
    """Writes the model of a checkpoint (DCP) into the new folder `out`, in the checkpoint's dtype.

    `config` is what the checkpoint was trained with; its `hf_assets_path` is the tokenizer. ConfigError, with nothing
    written, for a model of another family, another model's checkpoint, no tokenizer.json, or an `out` that is there.
    """
    spec, tokenizer = config.model_spec, Path(config.hf_assets_path)
    assert spec is not None
    problems = []
    if not (tokenizer / _TOKENIZER).is_file():
        message = f"has no {_TOKENIZER}; an exported model needs one"
        problems.append(Problem("hf_assets_path", message, config.hf_assets_path))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(Problem("--out", "is there already; give a new folder", str(out)))
    raise_if_any(problems)
    describe(spec)
    shapes = parameter_shapes(spec.model)
    if cast(Any, spec.model).enable_weight_tying:
        shapes.pop("lm_head.weight", None)
    write(spec, read_checkpoint(checkpoint, shapes), out)
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)
    if not (out / "tokenizer_config.json").exists():
        # Otherwise transformers takes a llama model's own class, which reads some files differently.
        (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")


def write(spec: ModelSpec, weights: Mapping[str, torch.Tensor], out: Path) -> None:
    """Writes a model's config.json and state dict into the folder `out`. ConfigError if it is no plain llama."""
    from safetensors.torch import save_file

    described = describe(spec)
    exported = Llama3StateDictAdapter(spec.model, hf_assets_path=None).to_hf(dict(weights))
    if len(exported) < len(weights.keys() - ({"lm_head.weight"} if described["tie_word_embeddings"] else set())):
        # The adapter leaves out what it does not know: a bias, say.
        raise ConfigError(Problem("model_spec", "it has parameters that transformers' llama has not", spec.name))
    out.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(exported.values())).dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps({**described, "torch_dtype": dtype}, indent=2) + "\n")
    save_file({name: weight.contiguous() for name, weight in exported.items()}, out / WEIGHTS, {"format": "pt"})


def describe(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a torchtitan model. ConfigError if it is of another family than llama."""
    model: Any = spec.model
    if not isinstance(model, Llama3Model.Config) or spec.state_dict_adapter is not Llama3StateDictAdapter:
        message = "only models of torchtitan's llama3 type can be exported to transformers"
        raise ConfigError(Problem("model_spec", message, spec.name))
    rope = model.first_attention.rope
    if rope.scaling == "yarn":
        raise ConfigError(Problem("model_spec", "its rotary embedding's scaling cannot be exported", rope.scaling))
    fields = fields_of(dataclasses.replace(spec, name="llama3"))  # a user's spec may have another name
    names = [name for name in ("rope_type", "rope_theta", *ROPE_SCALING) if name in fields]
    rope_parameters = {name: fields.pop(name) for name in names}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.layers[0].feed_forward.w1.out_features,
        "num_hidden_layers": len(model.layers),
        **fields,  # heads, epsilon, activation
        "num_key_value_heads": fields["num_key_value_heads"] or fields["num_attention_heads"],
        "head_dim": rope.dim,
        "max_position_embeddings": rope.max_seq_len,
        "tie_word_embeddings": model.enable_weight_tying,
        "rope_theta": rope.theta,
        "rope_parameters": rope_parameters,
        "bos_token_id": None,  # the tokenizer's files say it
        "eos_token_id": None,
    }


def parameter_shapes(model_config: Any) -> dict[str, torch.Size]:
    """Name -> shape of what a model's state dict has."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_config.build().state_dict().items()}


def read_checkpoint(
    checkpoint: str, shapes: Mapping[str, torch.Size], source: Callable[[str], str] = lambda name: name
) -> dict[str, torch.Tensor]:
    """Tensors out of a torchtitan checkpoint (DCP), in its dtype. ConfigError lists those that are not as expected.

    `shapes` has what is wanted, by name; `source` gives the name in the checkpoint.
    """
    try:
        reader = dcp_files.open_checkpoint(checkpoint)
        metadata: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:  # a missing folder, a damaged file: DCP raises many types
        raise ConfigError(Problem("CHECKPOINT", f"not a checkpoint of torchtitan: {error}", checkpoint)) from error
    found = {name: getattr(metadata.get(source(name)), "size", None) for name in shapes}
    problems = [
        Problem("CHECKPOINT", f"its {source(name)} is {found[name] or 'missing'}; {name} is {shape}", checkpoint)
        for name, shape in shapes.items()
        if found[name] != shape
    ]
    raise_if_any(problems)
    names = {source(name) for name in shapes}
    weights = {name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype) for name in names}
    dcp_files.load(weights, reader)
    return {name: weights[source(name)] for name in shapes}
