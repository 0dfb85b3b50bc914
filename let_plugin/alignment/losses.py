"""Alignment losses: how far each token's state is from its target, and the gradient of their weighted sum.

A loss is a pure function: per token, in the dtype of its inputs, differentiable with respect to both. lambda and the
number of valid tokens are known before the forward pass, so the gradient is formed where the hidden state is, and
injected in the backward pass: in closed form where there is one, which is faster, else by torch.func.vjp.

A token that does not count has a target of zeros. What a loss says of it is masked, so it has to be finite.

Shape legend: B batch, L sequence, D channels, M sampled tokens of the sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from let_plugin.alignment.registry import Registry

# Smallest norm that is divided by, as in torch.nn.functional.cosine_similarity.
_EPS = 1e-8


class Alignment(NamedTuple):
    """What one microbatch contributes."""

    gradient_BLD: torch.Tensor  # coefficient * d(sum of the tokens' losses) / d(hidden state)
    target_gradient_BLD: torch.Tensor | None  # the same of the target, for a projector that learns; None after that
    metric_sum: torch.Tensor  # sum over tokens of what is logged, fp32, 0-dim: their cosine similarity by default


class TokenLoss(Protocol):
    """Each token's loss, [B, L], in the dtype of hidden state and target, both [B, L, D].

    Options are further keyword arguments with defaults. ValueError for a bad one; the message begins with its name.
    """

    def __call__(self, student_BLD: torch.Tensor, target_BLD: torch.Tensor) -> torch.Tensor: ...


# (hidden state, its target, both [B, L, D]; coefficient, 0-dim or [B, L, 1]) -> the gradients of the loss.
ClosedForm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Alignment]
# The same with which tokens count, [B, L], bool or 0 and 1, before the coefficient, which is 0-dim, fp32.
AlignmentLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Alignment]


@dataclass(frozen=True)
class LossEntry:
    """A registered loss."""

    function: TokenLoss
    closed_form: ClosedForm | None = None  # the gradient of the sum of `function` without options, if it is known
    needs_whole_sequence: bool = False  # a token's loss looks at others of its row: no rank may hold a part of it


# An entry point may give the plain function.
LOSSES: Registry[LossEntry | TokenLoss] = Registry("alignment loss", "let_plugin.losses")


def register_loss(
    name: str, function: TokenLoss, *, closed_form: ClosedForm | None = None, needs_whole_sequence: bool = False
) -> None:
    """Makes `let.loss = name` mean `function` (see TokenLoss and LossEntry)."""
    LOSSES.register(name, LossEntry(function, closed_form, needs_whole_sequence))


def get_loss(name: str) -> LossEntry:
    """The loss called `name`; LookupError that suggests the nearest one if there is none."""
    entry = LOSSES.get(name)
    return entry if isinstance(entry, LossEntry) else LossEntry(entry)


def alignment_of(entry: LossEntry, options: Mapping[str, Any]) -> AlignmentLoss:
    """The gradients of a loss with these options, in the dtype of its inputs. ValueError for a bad option."""
    function = partial(entry.function, **options)
    function(*torch.zeros(2, 1, 1, 1, device="cpu"))  # a bad option is an error here, not in a step
    closed_form = None if options else entry.closed_form

    def align(
        student_BLD: torch.Tensor, target_BLD: torch.Tensor, counts_BL: torch.Tensor, coefficient: torch.Tensor
    ) -> Alignment:
        if closed_form is not None:
            return closed_form(student_BLD, target_BLD, (coefficient * counts_BL).to(student_BLD.dtype)[..., None])
        loss_BL, backward = torch.func.vjp(function, student_BLD, target_BLD)  # type: ignore[misc]
        gradient_BLD, target_gradient_BLD = backward((coefficient * counts_BL).to(loss_BL.dtype))
        metric_sum = (-cosine(student_BLD, target_BLD) * counts_BL).sum(dtype=torch.float32)
        return Alignment(gradient_BLD, target_gradient_BLD, metric_sum)

    return align


def cosine(student_BLD: torch.Tensor, target_BLD: torch.Tensor) -> torch.Tensor:
    """Negative cosine similarity, -<a, t> / (|a| |t|), per token (LET, arXiv 2602.05393)."""
    return -(F.normalize(student_BLD, dim=-1, eps=_EPS) * F.normalize(target_BLD, dim=-1, eps=_EPS)).sum(dim=-1)


def negative_cosine(student_BLD: torch.Tensor, target_BLD: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
    """The closed form of `cosine`, summed over tokens; one whose target is zero adds nothing to the sum of cosines.

    With c = <a, t> / (|a| |t|), the gradient with respect to a is -(t / (|a| |t|) - c a / |a|^2); for t, exchange them.
    """
    both = student_BLD, target_BLD
    student_norm_BL1, target_norm_BL1 = (x.norm(dim=-1, keepdim=True).clamp_min(_EPS) for x in both)
    product_BL1 = (student_BLD * target_BLD).sum(dim=-1, keepdim=True)
    cosine_BL1 = product_BL1 / student_norm_BL1 / target_norm_BL1
    across_BL1 = coefficient / student_norm_BL1 / target_norm_BL1
    return Alignment(
        gradient_BLD=student_BLD * (coefficient * cosine_BL1 / student_norm_BL1.square()) - target_BLD * across_BL1,
        target_gradient_BLD=target_BLD * (coefficient * cosine_BL1 / target_norm_BL1.square())
        - student_BLD * across_BL1,
        metric_sum=cosine_BL1.sum(dtype=torch.float32),
    )


def mse(student_BLD: torch.Tensor, target_BLD: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """Mean over channels of (a - t)^2, per token; `normalize`: of a and t of root mean square 1, 2 - 2 cos(a, t)."""
    if normalize:
        scale = student_BLD.shape[-1] ** 0.5  # of a vector whose root mean square is 1
        student_BLD, target_BLD = (F.normalize(x, dim=-1, eps=_EPS) * scale for x in (student_BLD, target_BLD))
    return (student_BLD - target_BLD).square().mean(dim=-1)


def smooth_l1(student_BLD: torch.Tensor, target_BLD: torch.Tensor, *, beta: float = 1.0) -> torch.Tensor:
    """Mean over channels of the smooth L1 distance, per token, to a standardized target (VkD, arXiv 2403.06213).

    With d = a - layer_norm(t): d^2 / (2 beta) where |d| < beta, else |d| - beta / 2. The student learns the scale.
    """
    if not 0 < beta < float("inf"):
        raise ValueError("beta must be greater than 0 and finite")
    target_BLD = F.layer_norm(target_BLD, target_BLD.shape[-1:])
    return F.smooth_l1_loss(student_BLD, target_BLD, beta=beta, reduction="none").mean(dim=-1)


def relational(student_BLD: torch.Tensor, target_BLD: torch.Tensor, *, stride: int = 8) -> torch.Tensor:
    """How the cosines between the tokens of a row differ from those between their targets, per token.

    For a token i among every `stride`-th: stride * mean over such j <= i that count of
    (cos(a_i, stop_grad(a_j)) - cos(t_i, t_j))^2. The others have a loss of zero; the factor `stride` makes up for them.
    No state's gradient depends on a later token, as j <= i and the gradient stops at a_j. Documents packed into one row
    are compared with each other. Holds several [B, L / stride, L / stride] in memory.
    """
    if not stride >= 1:
        raise ValueError("stride must be at least 1")
    u_BMD, v_BMD = (F.normalize(x_BLD[:, ::stride], dim=-1, eps=_EPS) for x_BLD in (student_BLD, target_BLD))
    counts_BM = target_BLD[:, ::stride].ne(0).any(dim=-1)
    difference_BMM = u_BMD @ u_BMD.detach().mT - v_BMD @ v_BMD.mT
    before_BMM = counts_BM[:, None, :].expand_as(difference_BMM).tril()
    number_BM = counts_BM.cumsum(dim=-1).clamp_min(1)
    loss_BM = stride * (difference_BMM.square() * before_BMM).sum(dim=-1) / number_BM
    # Zeros for the tokens between the sampled ones.
    return F.pad(loss_BM[..., None], (0, stride - 1)).flatten(1)[:, : student_BLD.shape[1]]


register_loss("cosine", cosine, closed_form=negative_cosine)
register_loss("mse", mse)
register_loss("smooth_l1", smooth_l1)
register_loss("relational", relational, needs_whole_sequence=True)
