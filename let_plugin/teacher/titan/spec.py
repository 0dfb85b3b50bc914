"""torchtitan specifications and config.json: a spec is made from one, or compared with it.

Weights of the right shapes load into the wrong architecture: SmolLM's into SmolLM2's spec, which turns its positions
ten times slower. config.json says what the shapes do not.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.models.common import FeedForward, RoPE
from torchtitan.protocols.model_spec import ModelSpec

from let_plugin.config.errors import Problem, raise_if_any
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.base import bad_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FAMILIES = ("llama", "mistral")  # of transformers; without a sliding window, Mistral's is Llama's architecture
# What torchtitan's llama has, under the names of config.json; a field that a family lacks is as wanted.
_WANTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_bidirectional_attention": None,
    "partial_rotary_factor": 1.0,
}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_MIN_HEAD_WIDTH = 16  # of FlexAttention
_LLAMA_NAMES = ("llama3", "qwen3")  # torchtitan's models whose config.json names the rotary fields as Llama's does


def obstacle(config: "PreTrainedConfig") -> str:
    """Why torchtitan's llama cannot compute what `config` describes; empty if it can."""
    if config.model_type not in _FAMILIES:
        return f"there is no native model for the family {config.model_type}"
    for field, wanted in _WANTED.items():
        found = getattr(config, field, wanted)
        if found != wanted and found is not None:
            return f"the native model has no {field} = {found!r}"
    rope = dict(config.rope_parameters or {})
    rope_type = rope.pop("rope_type", "default")
    known = {"rope_theta", *(ROPE_SCALING if rope_type == "llama3" else ())}
    if rope_type not in ("default", "llama3"):
        return f"the native model has no rope_type = {rope_type!r}"
    if extra := sorted(rope.keys() - known):
        return f"the native model has no {extra[0]} = {rope[extra[0]]!r}"
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_width * config.num_attention_heads != config.hidden_size:
        return f"the native model's heads have width hidden_size / num_attention_heads, not {head_width}"
    if head_width < _MIN_HEAD_WIDTH or head_width % 2:
        return f"the native model has no heads of width {head_width}"
    return ""


def make_spec(config: "PreTrainedConfig") -> ModelSpec:
    """The specification of the model that `config` describes, for which there is no `obstacle`."""
    rope = config.rope_parameters
    spec = llama_spec(
        config.model_type,
        dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        hidden_dim=config.intermediate_size,
        vocab_size=config.vocab_size,
        rope_theta=rope["rope_theta"],
        max_seq_len=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
    )
    if rope.get("rope_type") == "llama3":
        for _, own, _, _ in spec.traverse(RoPE.Config):
            own.scaling, own.scaling_factor = "llama", rope["factor"]
            for name in ROPE_SCALING[1:]:
                setattr(own, name, rope[name])
    return spec


def read_hf_config(folder: str) -> dict[str, Any]:
    """What config.json says; nothing if there is none. ConfigError if it cannot be read."""
    file = Path(folder, "config.json")
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise bad_path(folder, f"its config.json cannot be read: {error}") from error


def check_agrees(hf_config: dict[str, Any], spec: ModelSpec, *, name: str) -> None:
    """ConfigError with each field of config.json that means another model than `spec`, which the user calls `name`.

    Compares what the shapes of the weights do not show. A field that config.json leaves out is not compared.
    """
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    found = {**hf_config, **rope}
    if "rope_theta" in found:
        found["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    remedy = "take the spec of this checkpoint, or none: then its config.json is the spec"
    problems = []
    for field, wanted in fields_of(spec).items():
        value = found.get(field)
        if wanted is None or value is None or value == wanted:
            continue
        numbers = isinstance(wanted, (int, float)) and isinstance(value, (int, float))
        if not numbers or not math.isclose(value, wanted, rel_tol=1e-6):
            message = f"its config.json has {field} = {value!r}, the spec {wanted!r}; {remedy}"
            problems.append(Problem("let.teacher.spec", message, name))
    raise_if_any(problems)


def fields_of(spec: ModelSpec) -> dict[str, Any]:
    """What a torchtitan specification says, under the names of config.json."""
    model: Any = spec.model
    attention = model.first_attention
    is_gated = isinstance(getattr(model.layers[0], "feed_forward", None), FeedForward.Config)
    fields = {
        "num_attention_heads": getattr(attention, "n_heads", None),
        "num_key_value_heads": getattr(attention, "n_kv_heads", None),
        "rms_norm_eps": getattr(model.norm, "eps", None),
        "hidden_act": "silu" if is_gated else None,
    }
    rope = getattr(attention, "rope", None)
    if isinstance(rope, RoPE.Config):
        fields["rope_theta"] = rope.theta
        if spec.name in _LLAMA_NAMES:
            fields["rope_type"] = {"none": "default", "llama": "llama3", "yarn": "yarn"}[rope.scaling]
            if rope.scaling == "llama":
                fields["factor"] = rope.scaling_factor
                fields |= {name: getattr(rope, name) for name in ROPE_SCALING[1:]}
    return fields
