"""A teacher with its language-model head, loaded by TeacherSource.language_model: how well it predicts a text.

Shape legend: B batch, L sequence, V vocabulary.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.teacher.base import LanguageModel

# Logits that are held at a time, about: 0.5 GiB in fp32.
_MAX_LOGITS = 2**27


def loss_sums(
    model: LanguageModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
    *,
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Sum over the valid tokens of their cross-entropy, in nats, and their number: [2], fp64, on the model's `device`.

    Each batch has token ids [B, L], positions [B, L] or None, and labels [B, L], IGNORE_INDEX where a token does not
    count. `vocab_size` is V.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        tokens_BL, positions_BL, labels_BL = (None if t is None else t.to(device) for t in batch)
        assert tokens_BL is not None and labels_BL is not None
        sums += row_loss_sums(model, tokens_BL, positions_BL, labels_BL, vocab_size=vocab_size).sum(dim=0)
    return sums


@torch.no_grad()
def row_loss_sums(
    model: LanguageModel,
    tokens_BL: torch.Tensor,
    positions_BL: torch.Tensor | None,
    labels_BL: torch.Tensor,
    *,
    vocab_size: int,
) -> torch.Tensor:
    """Of each row the sum over the valid tokens of their cross-entropy, in nats, and their number: [B, 2], fp64.

    The cross-entropy of a token is formed in fp32. As many rows go through the model at a time as keep the logits
    small. All tensors are on the model's device; else as `loss_sums`.
    """
    num_rows = max(1, _MAX_LOGITS // (tokens_BL.shape[1] * vocab_size))
    sums = []
    for start in range(0, len(tokens_BL), num_rows):
        rows = slice(start, start + num_rows)
        labels_RL = labels_BL[rows]
        logits_RLV = model(tokens_BL[rows], None if positions_BL is None else positions_BL[rows])
        losses_N = F.cross_entropy(
            logits_RLV.flatten(0, 1).float(), labels_RL.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        losses_RL = losses_N.view_as(labels_RL)
        sums.append(torch.stack([losses_RL.double().sum(dim=1), (labels_RL != IGNORE_INDEX).sum(dim=1)], dim=1))
    return torch.cat(sums)
