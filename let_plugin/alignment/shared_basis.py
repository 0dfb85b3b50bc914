"""A student that starts in its teacher's basis: its embeddings and its head are made of the teacher's.

With P [D, E] the matrix of a dimension match, a state h of the teacher is P h to the student. So an embedding e
becomes P e, and the head W diag(g) P^+, with W the teacher's head, g the weight of its final norm and P^+ the
pseudo-inverse of P, reads in P h what the teacher's reads in h.

Shape legend: D student width, E teacher width.
"""

from typing import NamedTuple

import torch
from torch import nn


class SharedBasis(NamedTuple):
    """P and P^+, in fp32, on the CPU."""

    into_DE: torch.Tensor
    back_ED: torch.Tensor

    @property
    def logit_scale(self) -> float:
        """What the student's final norm divides P h by, if h has a mean square of 1: |P| / sqrt(D), Frobenius' norm.

        Exact where P keeps all angles; else the root mean square over states whose channels are independent. With this
        factor a head's logits are as large as the teacher's.
        """
        return float(self.into_DE.double().norm() / len(self.into_DE) ** 0.5)


@torch.no_grad()
def shared_basis(match: nn.Module, in_width: int, *, side: str) -> SharedBasis:
    """The basis of a match from `in_width` channels. ValueError if it is not one linear map throughout the run.

    On the side "teacher" it maps the teacher's states, and its matrix is P; on the side "student" its matrix is P^+.
    """
    if any(True for _ in match.parameters()):
        raise ValueError("its map changes while the run goes on")
    identity = torch.eye(in_width, device="cpu")[None]
    matrix = match(identity)[0].T.contiguous()
    if not torch.allclose(match(-2 * identity)[0].T, -2 * matrix, atol=1e-5):
        raise ValueError("its map is not linear")
    inverse = torch.linalg.pinv(matrix.double()).float()
    return SharedBasis(matrix, inverse) if side == "teacher" else SharedBasis(inverse, matrix)
