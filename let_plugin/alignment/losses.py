"""Alignment losses: per token, in fp32, together with their gradients in closed form.

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
        gradient_BLD: coefficient * d(sum of the tokens' losses) / d(hidden state), fp32.
        cosine_sum: Sum of the tokens' cosine similarities, fp32, 0-dim: the metric, whatever the loss.
    """

    gradient_BLD: torch.Tensor
    cosine_sum: torch.Tensor


class AlignmentLoss(Protocol):
    """Loss gradient for a hidden state and its target, both [B, L, D]; `coefficient` is 0-dim, fp32."""

    def __call__(self, student_BLD: torch.Tensor, target_BLD: torch.Tensor, coefficient: torch.Tensor) -> Alignment: ...


LOSSES: Registry[AlignmentLoss] = Registry("alignment loss", "let_plugin.losses")


def negative_cosine(student_BLD: torch.Tensor, target_BLD: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
    """Negative cosine similarity, -<a, t> / (|a| |t|), summed over tokens, in fp32 (LET, arXiv 2602.05393).

    With unit vectors u = a/|a| and v = t/|t|, the gradient with respect to a is -(v - <u, v> u) / |a|.
    """
    student_BLD, target_BLD = student_BLD.float(), target_BLD.float()
    student_norm_BL1 = student_BLD.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    u_BLD = student_BLD / student_norm_BL1
    v_BLD = target_BLD / target_BLD.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    cosine_BL1 = (u_BLD * v_BLD).sum(dim=-1, keepdim=True)
    gradient_BLD = (cosine_BL1 * u_BLD - v_BLD) * (coefficient / student_norm_BL1)
    return Alignment(gradient_BLD, cosine_BL1.sum())


LOSSES.register("cosine", negative_cosine)
