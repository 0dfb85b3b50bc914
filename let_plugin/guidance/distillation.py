"""Logit distillation, the baseline that LET is compared with: the student's predictions are drawn to the teacher's.

What travels from the teacher to the student's last block is the teacher's last state, as in LET; the logits of both are
made there, a few tokens at a time. So they are never there for a whole batch, at any vocabulary.

Shape legend: B batch, L sequence, T tokens, E teacher width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.base import Teacher, TeacherSource

_TRIAL_TOKENS = 8  # that the head is tried out on
_TOLERANCE = 0.05  # of the teacher's states, which may be in bf16 or quantised, relative to those of fp32


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


class TeacherHead:
    """The teacher's language-model head, whole on this rank: its last state, after the final norm, to logits.

    The whole model is loaded for a moment, in fp32, to take the head from it and to see that it is all that there is
    between the two.

    Args:
        source: The teacher's.
        teacher: The teacher, built for its last layer alone. All ranks that share it make a head at the same time.
        dtype: Data type of the head.
        device: This rank's device.

    Raises:
        ConfigError: If its family makes logits in another way: scales or caps them, say.
    """

    @torch.no_grad()
    def __init__(self, source: TeacherSource, teacher: Teacher, *, dtype: torch.dtype, device: torch.device) -> None:
        model = source.language_model(dtype=torch.float32, device=device, seq_len=_TRIAL_TOKENS)
        weight, bias = model.head.weight, getattr(model.head, "bias", None)
        assert isinstance(weight, torch.Tensor)
        given: list[torch.Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda head, args: given.append(args[0]))
        tokens_BL = torch.arange(_TRIAL_TOKENS, device=device)[None] % source.info.vocab_size
        logits_BLV = model(tokens_BL, None)
        hook.remove()
        states_BLE = teacher(tokens_BL, None)
        is_product = torch.allclose(logits_BLV, F.linear(given[0], weight, bias), rtol=1e-3, atol=1e-3)
        difference = (states_BLE.float() - given[0]).norm() / given[0].norm()
        if not (is_product and difference < _TOLERANCE):
            message = "its logits are not just the product of its last state and its head; choose another teacher"
            raise ConfigError(Problem("let.target", f"{source.info.description}: {message}", "logits"))
        self._weight = weight.to(dtype, copy=True)
        self._bias = None if bias is None else bias.to(dtype, copy=True)

    def __call__(self, states_TE: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] in the head's dtype, without a gradient."""
        with torch.no_grad():
            return F.linear(states_TE.to(self._weight.dtype), self._weight, self._bias)


def distillation_from(head: TeacherHead, *, temperature: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(the student's logits [T, V], the teacher's states [T, E]) -> sum of the tokens' losses, fp32.

    A token whose state is zero does not count.
    """

    def loss(logits_TV: torch.Tensor, states_TE: torch.Tensor) -> torch.Tensor:
        counts_T = states_TE.ne(0).any(dim=-1)
        losses_T = distillation(logits_TV, head(states_TE).float(), temperature=temperature)
        return (losses_T * counts_T).sum()

    return loss
