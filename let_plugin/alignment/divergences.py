"""How far a student's predictions are from its teacher's, and the gradient with respect to the student's logits.

Shape legend: T tokens, V vocabulary, or the part of it that this rank has.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

_OUT = -1e9  # the logit of a class that does not exist: its probability is exactly 0, and nothing is infinite


class Divergence(NamedTuple):
    """temperature^2 * D(p, q) of each token, with p and q softmax(logits / temperature) of teacher and student.

    D is KL(p || q), KL(q || p), or the mean of KL(q || m) and KL(p || m) with m = (p + q) / 2. The factor keeps the
    gradient's size (Hinton et al., arXiv 1503.02531). With c = dD/dq, the gradient with respect to the student's logits
    is temperature * q (c - <q, c>).

    With `top_k`, the classes whose probability is below the teacher's k-th largest are one class: p has the mass that
    it has on them, spread over them as q is.

    `group`: the ranks that have a part of the vocabulary each. A few numbers a token are reduced, no logits gathered.
    """

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    temperature: float = 1.0
    top_k: int | None = None
    group: dist.ProcessGroup | None = None

    @torch.no_grad()
    def __call__(
        self, student_TV: torch.Tensor, teacher_TV: torch.Tensor, exists_V: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of fp32 logits and the classes that both models have (bool; None: all): divergences [T], gradients [T, V]."""
        log_q_TV, log_p_TV = (self._log_softmax(logits, exists_V) for logits in (student_TV, teacher_TV))
        q_TV, p_TV = log_q_TV.exp(), log_p_TV.exp()
        if self.top_k is not None:
            is_top_TV = log_p_TV >= self._kth_largest(log_p_TV, self.top_k)
            rest_T2 = torch.stack([(x * ~is_top_TV).sum(dim=-1) for x in (p_TV, q_TV)], dim=-1)
            log_p, log_q = self._sum(rest_T2).clamp_min(torch.finfo(torch.float32).tiny).log().split(1, dim=-1)
            log_p_TV = torch.where(is_top_TV, log_p_TV, log_q_TV + (log_p - log_q))
            p_TV = log_p_TV.exp()
        if self.kind == "forward_kl":
            losses_TV, gradient_TV = p_TV * (log_p_TV - log_q_TV), q_TV - p_TV
        else:
            if self.kind == "reverse_kl":
                c_TV = log_q_TV - log_p_TV
                losses_TV = q_TV * c_TV
            else:
                log_m_TV = torch.logaddexp(log_p_TV, log_q_TV) - math.log(2)
                c_TV = (log_q_TV - log_m_TV) / 2
                losses_TV = q_TV * c_TV + p_TV * (log_p_TV - log_m_TV) / 2
            gradient_TV = q_TV * (c_TV - self._sum((q_TV * c_TV).sum(dim=-1, keepdim=True)))
        losses_T = self._sum(losses_TV.sum(dim=-1))
        return self.temperature**2 * losses_T, self.temperature * gradient_TV

    def _log_softmax(self, logits_TV: torch.Tensor, exists_V: torch.Tensor | None) -> torch.Tensor:
        logits_TV = logits_TV / self.temperature
        if exists_V is not None:
            logits_TV = logits_TV.masked_fill(~exists_V, _OUT)
        log_total_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
        if self.group is not None:
            highest_T1 = log_total_T1.clone()
            dist.all_reduce(highest_T1, dist.ReduceOp.MAX, group=self.group)
            log_total_T1 = highest_T1 + self._sum((log_total_T1 - highest_T1).exp()).log()
        return logits_TV - log_total_T1

    def _kth_largest(self, values_TV: torch.Tensor, k: int) -> torch.Tensor:
        padded_TV = F.pad(values_TV, (0, max(0, k - values_TV.shape[-1])), value=-math.inf)
        largest_TK = padded_TV.topk(k, dim=-1).values
        if self.group is not None:
            parts = [torch.empty_like(largest_TK) for _ in range(self.group.size())]
            dist.all_gather(parts, largest_TK, group=self.group)
            largest_TK = torch.cat(parts, dim=-1).topk(k, dim=-1).values
        return largest_TK[:, -1:]

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over the ranks that have a part of the vocabulary; in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values
