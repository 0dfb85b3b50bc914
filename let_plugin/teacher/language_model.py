"""A teacher with its language-model head: to say how well it predicts a text, not to teach.

A source's `language_model` loads it; a run that only aligns never does. Shape legend: B batch, L sequence,
V vocabulary.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.teacher.base import LanguageModel

if TYPE_CHECKING:
    pass

# Logits that are held at a time, about: 0.5 GiB in fp32.
_MAX_LOGITS = 2**27


@torch.no_grad()
def loss_sums(
    model: LanguageModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
    *,
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Sum over the valid tokens of their cross-entropy, in nats, and their number: [2], fp64, on `device`.

    The cross-entropy of a token is formed in fp32. As many rows go through the model at a time as keep the logits
    small.

    Args:
        model: The teacher's, on `device`.
        batches: Token ids [B, L], positions [B, L] or None, and labels [B, L], IGNORE_INDEX where a token does not
            count.
        vocab_size: V.
        device: Where the model is.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        tokens_BL, positions_BL, labels_BL = (None if t is None else t.to(device) for t in batch)
        assert tokens_BL is not None and labels_BL is not None
        num_rows = max(1, _MAX_LOGITS // (tokens_BL.shape[1] * vocab_size))
        for start in range(0, len(tokens_BL), num_rows):
            rows = slice(start, start + num_rows)
            labels_N = labels_BL[rows].flatten()
            logits_BLV = model(tokens_BL[rows], None if positions_BL is None else positions_BL[rows])
            losses_N = F.cross_entropy(
                logits_BLV.flatten(0, 1).float(), labels_N, ignore_index=IGNORE_INDEX, reduction="none"
            )
            sums[0] += losses_N.double().sum()
            sums[1] += (labels_N != IGNORE_INDEX).sum()
    return sums


class TransformersLanguageModel:
    """A `transformers` causal language model, with the attention function of `hf_attention.py`: [B, L] to [B, L, V].

    Everything that its family does to the logits (soft caps, scales) is done.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.head: nn.Module = model.get_output_embeddings()

    def __call__(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
        from let_plugin.teacher.hf_attention import DocumentMask

        documents = DocumentMask(positions_BL)
        if positions_BL is None:
            positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        arguments: dict[str, Any] = {
            "input_ids": tokens_BL,
            "position_ids": positions_BL,
            "let_documents": documents,
        }
        return self._model(**arguments, use_cache=False).logits
