"""Compares a torchtitan specification with the config.json that lies beside the weights.

Weights of the right shapes load into the wrong architecture: SmolLM's into SmolLM2's specification, which turns its
positions ten times slower. config.json says what the shapes do not.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtitan.models.common import FeedForward, RoPE
from torchtitan.protocols.model_spec import ModelSpec

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.titan.specs import BUILT_IN_SPECS

_ROTATES_WHOLE_HEADS = ("llama3", "qwen3")


def read_hf_config(folder: str) -> dict[str, Any] | None:
    """What config.json says; None if there is none. ConfigError if it cannot be read."""
    file = Path(folder, "config.json")
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("let.teacher.path", f"its config.json cannot be read: {error}", folder)) from error
    return content


def check_agrees(hf_config: dict[str, Any], spec: ModelSpec, *, name: str) -> None:
    """ConfigError with a Problem for each field of config.json that means another model than `spec` does.

    Args:
        hf_config: What config.json says. A field that it leaves out, or that `spec` knows nothing of, is not compared.
        spec: The specification.
        name: The name of it that the user gave.
    """
    different = _differences(hf_config, spec)
    if not different:
        return
    others = [other for other, make_spec in BUILT_IN_SPECS.items() if not _differences(hf_config, make_spec())]
    remedy = f"take {others[0]!r}" if others else "take the spec of this checkpoint, or the checkpoint of this spec"
    raise ConfigError(
        Problem("let.teacher.spec", f"its config.json has {field} = {found!r}, the spec {wanted!r}; {remedy}", name)
        for field, found, wanted in different
    )


def _differences(hf_config: dict[str, Any], spec: ModelSpec) -> list[tuple[str, Any, Any]]:
    """(field of config.json, its value there, its value in the spec) of each that differs."""
    known = {field: value for field, value in _fields(spec) if value is not None}
    found = {**hf_config, **_rope_fields(hf_config)}
    return [
        (field, found[field], wanted)
        for field, wanted in known.items()
        if found.get(field) is not None and not _same(found[field], wanted)
    ]


def _fields(spec: ModelSpec) -> Iterable[tuple[str, Any]]:
    """What a torchtitan specification says, under the names of config.json."""
    model: Any = spec.model
    yield "hidden_size", model.dim
    yield "num_hidden_layers", len(model.layers)
    yield "vocab_size", model.vocab_size
    yield "rms_norm_eps", getattr(model.norm, "eps", None)
    attention = model.first_attention
    num_heads = getattr(attention, "n_heads", None)
    yield "num_attention_heads", num_heads
    if hasattr(attention, "n_kv_heads"):
        yield "num_key_value_heads", attention.n_kv_heads or num_heads
    feed_forward = getattr(model.layers[0], "feed_forward", None)
    if isinstance(feed_forward, FeedForward.Config):
        yield "intermediate_size", feed_forward.w1.out_features
        yield "hidden_act", "silu"
    rope = getattr(attention, "rope", None)
    if not isinstance(rope, RoPE.Config):
        return
    yield "rope_theta", rope.theta
    if spec.name not in _ROTATES_WHOLE_HEADS:
        return  # the other families' config.json has names of its own
    yield "head_dim", rope.dim
    yield "rope_type", {"none": "default", "llama": "llama3", "yarn": "yarn"}[rope.scaling]
    if rope.scaling == "llama":
        yield "factor", rope.scaling_factor
        yield "low_freq_factor", rope.low_freq_factor
        yield "high_freq_factor", rope.high_freq_factor
        yield "original_max_position_embeddings", rope.original_max_position_embeddings


def _rope_fields(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the rotary embedding, wherever this version of transformers has put them."""
    nested = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not (nested or "rope_theta" in hf_config) or any(isinstance(value, dict) for value in nested.values()):
        return {}  # it says nothing of them, or something for each type of layer
    rope_type = nested.get("rope_type", nested.get("type", "default"))
    return {"rope_theta": hf_config.get("rope_theta"), **nested, "rope_type": rope_type}


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)
