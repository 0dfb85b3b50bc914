"""Logit distillation, the baseline that LET is compared with: the student's predictions are drawn to the teacher's.

Shape legend: T tokens, V vocabulary.
"""

import torch


def distillation(
    student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """temperature^2 * KL(p_teacher || p_student) of each token, [T], with p = softmax(logits / temperature).

    The factor keeps the size of the gradient about the same at any temperature (Hinton et al., arXiv 1503.02531). Rows
    of either vocabulary beyond the other's (padding, mostly) are left out.
    """
    width = min(student_logits_TV.shape[-1], teacher_logits_TV.shape[-1])
    student_TV = (student_logits_TV[:, :width] / temperature).log_softmax(dim=-1)
    teacher_TV = (teacher_logits_TV[:, :width] / temperature).log_softmax(dim=-1)
    return temperature**2 * (teacher_TV.exp() * (teacher_TV - student_TV)).sum(dim=-1)
