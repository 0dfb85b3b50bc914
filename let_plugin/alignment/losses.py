"""Alignment losses: per token, in the dtype of their inputs, together with their gradients in closed form.

lambda and the number of valid tokens are known before the forward pass, so the gradient of the weighted loss can be
formed where the hidden state is, and injected in the backward pass; no autograd graph is built for it. A token that
does not count has a target of zeros, for which loss and gradient are zero.

Shape legend: B batch, L sequence, D student width.
"""

from typing import NamedTuple, Protocol

import torch

from let_plugin.registry import Registry

# Smallest norm that is divided by, as in torch.nn.functional.cosine_similarity.
_EPS = 1e-8


class Alignment(NamedTuple):
    """What one microbatch contributes.

    Attributes:
        gradient_BLD: coefficient * d(sum of the tokens' losses) / d(hidden state).
        target_gradient_BLD: The same with respect to the target, for a projector that learns.
        cosine_sum: Sum of the tokens' cosine similarities, fp32, 0-dim: the metric, whatever the loss.
    """

    gradient_BLD: torch.Tensor
    target_gradient_BLD: torch.Tensor
    cosine_sum: torch.Tensor


class AlignmentLoss(Protocol):
    """Loss gradients for a hidden state and its target, both [B, L, D]; `coefficient` is 0-dim, fp32."""

    def __call__(self, student_BLD: torch.Tensor, target_BLD: torch.Tensor, coefficient: torch.Tensor) -> Alignment: ...


LOSSES: Registry[AlignmentLoss] = Registry("alignment loss", "let_plugin.losses")


def negative_cosine(student_BLD: torch.Tensor, target_BLD: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
    """Negative cosine similarity, -<a, t> / (|a| |t|), summed over tokens (LET, arXiv 2602.05393).

    With unit vectors u = a/|a| and v = t/|t|, the gradient with respect to a is -(v - <u, v> u) / |a|, and with respect
    to t the same with the two exchanged.
    """
    u_BLD, student_norm_BL1 = _normalise(student_BLD)
    v_BLD, target_norm_BL1 = _normalise(target_BLD)
    cosine_BL1 = (u_BLD * v_BLD).sum(dim=-1, keepdim=True)
    return Alignment(
        gradient_BLD=(cosine_BL1 * u_BLD - v_BLD) * (coefficient / student_norm_BL1),
        target_gradient_BLD=(cosine_BL1 * v_BLD - u_BLD) * (coefficient / target_norm_BL1),
        cosine_sum=cosine_BL1.sum(dtype=torch.float32),
    )


def _normalise(hidden_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norm_BL1 = hidden_BLD.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    return hidden_BLD / norm_BL1, norm_BL1


LOSSES.register("cosine", negative_cosine)
