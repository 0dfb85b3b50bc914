"""Attention of a `transformers` decoder over packed documents: each token sees its own document's past only.

`transformers` would build the mask from `position_ids`, and read them on the host to do so (one synchronization per
forward); OPT does not pass its positions to the mask at all; a ready-made 4-D mask would lose the sliding windows. So
the teacher's attention is a function of our own (`AttentionInterface.register`). For a function without a registered
mask builder the model builds no mask, and passes each layer's window and our `let_documents` on to the function.

The function adds the mask: none where `is_causal` says it all (one document per row), else one dense boolean mask for
each window, made once per forward and shared by the layers.

Shape legend: B batch, L sequence, N query heads, K key-value heads, H head width.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Its name in `transformers`. Not registered with AttentionMaskInterface, on purpose: see above.
ATTENTION = "let_packed"

# Arguments with which a family asks for attention that SDPA does not compute.
_UNSUPPORTED_ARGUMENTS = ("s_aux", "indices", "block_mask")


class DocumentMask:
    """The boolean attention masks of one forward, made on first use, one for each window; positions as in Teacher."""

    def __init__(self, positions_BL: torch.Tensor | None) -> None:
        self._documents_BL = None if positions_BL is None else (positions_BL == 0).cumsum(-1)
        self._masks: dict[int | None, torch.Tensor] = {}

    def get(self, seq_len: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """[B or 1, 1, L, L], True where a query (dim 2) sees a key (dim 3); None if that is plain causal attention.

        Reads no tensor on the host.
        """
        if window is not None and window >= seq_len:
            window = None
        if self._documents_BL is None and window is None:
            return None
        if window not in self._masks:
            index_L = torch.arange(seq_len, device=device)
            distance_LL = index_L[:, None] - index_L[None, :]
            mask_BLL = (distance_LL >= 0)[None]
            if window is not None:
                mask_BLL = mask_BLL & (distance_LL < window)
            if self._documents_BL is not None:
                mask_BLL = mask_BLL & (self._documents_BL[:, :, None] == self._documents_BL[:, None, :])
            self._masks[window] = mask_BLL[:, None]
        return self._masks[window]


def model_inputs(tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None) -> dict[str, Any]:
    """What a `transformers` model with this attention function is called with; the arguments are Teacher.forward's."""
    documents = DocumentMask(positions_BL)
    if positions_BL is None:
        positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
    return {"input_ids": tokens_BL, "position_ids": positions_BL, "let_documents": documents, "use_cache": False}


def attention(
    module: nn.Module,
    query_BNLH: torch.Tensor,
    key_BKLH: torch.Tensor,
    value_BKLH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    let_documents: DocumentMask | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B, L, N, H] in the query's dtype, in the signature that `transformers` calls attention functions with.

    NotImplementedError if the family asks for something that this function cannot do: a lost window, or a leak between
    documents, would silently be a wrong target.
    """
    reason = ""
    if let_documents is None:
        reason = "does not hand keyword arguments on to its attention"
    elif attention_mask is not None:
        reason = "builds an attention mask of its own"
    elif kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        reason = "has attention that is not causal"
    elif needed := [name for name in _UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]:
        reason = f"needs {needed[0]!r} in its attention, which SDPA cannot do"
    elif "sliding_window" not in kwargs and _config_has_window(module):
        reason = "has a sliding window, but does not hand it to its attention"
    if reason or let_documents is None:
        raise NotImplementedError(f"the model {reason}")
    mask = let_documents.get(query_BNLH.shape[2], kwargs.pop("sliding_window", None), query_BNLH.device)
    if softcap is None:
        return sdpa_attention_forward(module, query_BNLH, key_BKLH, value_BKLH, mask, dropout=dropout, **kwargs)
    # SDPA cannot cap scores (Gemma 2), so they exist in full, [B, N, L, L].
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    if mask is None:
        seq_len = query_BNLH.shape[2]
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=query_BNLH.device).tril()
    bias = torch.zeros_like(mask, dtype=query_BNLH.dtype).masked_fill(~mask, float("-inf"))
    scaling = kwargs.get("scaling")
    states_BLNH, _ = eager_attention_forward(module, query_BNLH, key_BKLH, value_BKLH, bias, 0.0, scaling, softcap)
    return states_BLNH, None


def _config_has_window(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) is not None


AttentionInterface.register(ATTENTION, attention)
