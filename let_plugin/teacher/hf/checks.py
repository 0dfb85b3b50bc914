"""Whether a `transformers` model can be a teacher: asked of its class and configuration, then seen from a short run.

Shape legend: B batch, L sequence, E teacher width.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.base import Teacher, TeacherInfo, bad_path

_LAYER_TYPES = {"full_attention", "sliding_attention"}  # as `transformers` names them
_LENGTH = 6  # tokens of a document in the trial


def check_is_decoder(config: PreTrainedConfig, teacher_config: TeacherConfig) -> None:
    """ConfigError if `config` does not describe a text decoder with unquantized weights."""
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
        message = "its weights are quantized; give a checkpoint in bfloat16 or float32, or a .gguf file"
    else:
        return
    raise bad_path(teacher_config.path, f"a teacher is a text decoder: {message}")


def check_isolates_documents(config: PreTrainedConfig, trunk: nn.Module, path: str) -> None:
    """ConfigError for what can be told from the model's class and configuration; `try_out` does the rest."""
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
        raise bad_path(path, message)
    try:
        find_layers(trunk, config.num_hidden_layers)
    except ValueError as error:
        raise bad_path(path, str(error)) from error


def find_layers(trunk: nn.Module, num_layers: int) -> nn.ModuleList:
    """The outermost ModuleList with as many entries as the model has layers; ValueError if there is none."""
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(trunk).__name__} has no list of {num_layers} layers")


@torch.no_grad()
def try_out(
    teacher: Teacher, blocks: nn.ModuleList, info: TeacherInfo, *, layers: Sequence[int | str], width: int, path: str
) -> None:
    """Runs a loaded teacher over short documents. Collective over the ranks that it is sharded over.

    ConfigError if it does not run, its states have another width E than `width`, a teacher that was cut does not run
    each of its blocks once, in order (where blocks run in loops, states depend on those behind them), or a document's
    states depend on the one before it: a family may pass `check_isolates_documents` but have other ways from token to
    token (a convolution, say).
    """
    device = next(blocks.parameters()).device
    tokens_BL = torch.arange(2 * _LENGTH, device=device).repeat(2, 1) % info.vocab_size
    positions_BL = torch.arange(_LENGTH, device=device).repeat(2, 2)  # two documents in each row
    changed_BL = tokens_BL.clone()
    changed_BL[0, :_LENGTH] = (changed_BL[0, :_LENGTH] + 1) % info.vocab_size
    order: list[int] = []  # the blocks that run, call by call
    handles = [block.register_forward_hook(lambda *_, i=i: order.append(i)) for i, block in enumerate(blocks)]
    try:
        states_BLE, changed_BLE = teacher(tokens_BL, positions_BL), teacher(changed_BL, positions_BL)
    except Exception as error:  # whatever this family's code raises when it is given our arguments
        message = f"{info.description} cannot run over packed documents: {error}"
        raise bad_path(path, message) from error
    finally:
        for handle in handles:
            handle.remove()
    if len(blocks) < info.num_layers and order != 2 * list(range(len(blocks))):
        message = f"{info.description}: its blocks do not run once each, in order; choose its last layer"
        raise ConfigError(Problem("let.pairs", message, list(layers)))
    # A masked token contributes exactly 0, but a mixture-of-experts layer groups tokens differently: hence a tolerance
    # relative to the effect that the change has where it may have one.
    effect = (changed_BLE - states_BLE)[0, :_LENGTH].float().norm()
    leak = (changed_BLE - states_BLE)[0, _LENGTH:].float().norm()
    message = ""
    if states_BLE.shape[-1] != width:
        message = f"its states have width {states_BLE.shape[-1]}, its configuration says {width}"
    elif not leak <= 1e-2 * effect:
        message = f"{info.description}: a document's states depend on the document before it; choose another teacher"
    if message:
        raise bad_path(path, message)
