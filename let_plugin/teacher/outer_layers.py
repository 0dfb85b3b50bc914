"""What is around a teacher's blocks: its token embeddings, its final norm and its language-model head.

Some families scale the embeddings, centre in the norm or cap the logits. So what the teacher makes of a few tokens is
compared with what is taken from it. Shape legend: T tokens, V vocabulary, E teacher width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from let_plugin.config.errors import ConfigError, Problem

_TRIAL_TOKENS = 8
_TOLERANCE = 1e-3  # relative


def trial_tokens(vocab_size: int) -> torch.Tensor:
    """Rows of one token each, [T, 1]: all of them at the same position."""
    return torch.linspace(0, vocab_size - 1, _TRIAL_TOKENS, device="cpu").long()[:, None]


def entering_embeddings(embeddings_VE: torch.Tensor, entering_TE: torch.Tensor) -> torch.Tensor:
    """The embeddings as they enter the first block: [V, E]. ConfigError if the model does more than to scale them.

    `entering_TE` is what has entered for the trial tokens. What it has in common, a position's embedding, is left out.
    """
    given_TE = embeddings_VE[trial_tokens(len(embeddings_VE))[:, 0]]
    given_TE, got_TE = given_TE - given_TE.mean(dim=0), entering_TE - entering_TE.mean(dim=0)
    factor = (given_TE * got_TE).sum() / given_TE.square().sum()
    if not (got_TE - factor * given_TE).norm() <= _TOLERANCE * got_TE.norm():
        message = "what enters its first block is not a multiple of its token embeddings; choose another teacher"
        raise ConfigError(Problem("let.init.parts", message))
    return embeddings_VE if abs(factor - 1) < _TOLERANCE else embeddings_VE * factor


def folded_head(
    weight_VE: torch.Tensor, norm_E: torch.Tensor, eps: float, leaving_TE: torch.Tensor, logits_TV: torch.Tensor
) -> torch.Tensor:
    """The head's weight times the final norm's, which some families keep less 1: [V, E].

    ConfigError if `logits_TV`, what the model has made of the trial tokens, are more than these two make of
    `leaving_TE`, what has left its last block.
    """
    states_TE = leaving_TE * leaving_TE.square().mean(dim=-1, keepdim=True).add(eps).rsqrt()
    for gain_E in (norm_E, 1 + norm_E):
        head_VE = weight_VE * gain_E
        if (states_TE @ head_VE.T - logits_TV).norm() <= _TOLERANCE * logits_TV.norm():
            return head_VE
    message = (
        "the teacher's logits are more than an RMS norm and a head without a bias (a LayerNorm, a scale, a soft cap); "
        'choose another teacher, or "embeddings", which take neither'
    )
    raise ConfigError(Problem("let.init.parts", message))


def plain_head(
    head: nn.Module, last_TE: torch.Tensor, given_TE: torch.Tensor, logits_TV: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Weight and, if there is one, bias of a head. ConfigError if the logits of the trial tokens, `logits_TV`, are not
    just its product with their last states, `last_TE`; `given_TE` is what it has been given."""
    weight_VE, bias_V = head.get_parameter("weight"), getattr(head, "bias", None)
    product_TV = F.linear(last_TE, weight_VE, bias_V)
    pairs = ((last_TE, given_TE), (product_TV, logits_TV))
    if not all((got - expected).norm() <= _TOLERANCE * expected.norm() for got, expected in pairs):
        message = "the teacher's logits are not just the product of its last state and its head; choose another teacher"
        raise ConfigError(Problem("let.teacher.path", message))
    return {"weight": weight_VE.detach()} | ({} if bias_V is None else {"bias": bias_V.detach()})
