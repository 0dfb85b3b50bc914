"""How the teacher's width becomes the student's.

A dimension match is a module from [B, L, E] to [B, L, D] in fp32. One with parameters learns: `let_plugin.learned` owns
its weights, and calls it with them.

Shape legend: B batch, L sequence, D student width, E teacher width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from let_plugin.registry import Registry


class DimensionMatch(Protocol):
    """Makes the module that maps [B, L, `teacher_width`] to [B, L, `student_width`].

    Its parameters, if it has any, are initialised without random numbers, or with a generator of its own: they must
    be the same on every rank and in every world size.
    """

    def __call__(self, teacher_width: int, student_width: int, *, align_corners: bool) -> nn.Module: ...


DIMENSION_MATCHES: Registry[DimensionMatch] = Registry("dimension match", "let_plugin.dimension_matches")


def interpolate(teacher_BLE: torch.Tensor, width: int, *, align_corners: bool = False) -> torch.Tensor:
    """1-D linear interpolation along the channels (LET); the identity when the widths are equal."""
    if teacher_BLE.shape[-1] == width:
        return teacher_BLE
    # F.interpolate reads [N, C, W]: the sequence stands where it expects channels, each token is resampled alone.
    return F.interpolate(teacher_BLE, size=width, mode="linear", align_corners=align_corners)


class Interpolate(nn.Module):
    """`interpolate` as a dimension match (the paper's)."""

    def __init__(self, teacher_width: int, student_width: int, *, align_corners: bool = False) -> None:
        super().__init__()
        self._width = student_width
        self._align_corners = align_corners

    def forward(self, teacher_BLE: torch.Tensor) -> torch.Tensor:
        return interpolate(teacher_BLE, self._width, align_corners=self._align_corners)


class LearnedLinear(nn.Module):
    """A learned linear map, without bias, that starts as the interpolation and is trained with the student.

    Starting there makes step 0 that of the paper's recipe, and needs no random numbers.
    """

    def __init__(self, teacher_width: int, student_width: int, *, align_corners: bool = False) -> None:
        super().__init__()
        identity_1EE = torch.eye(teacher_width, device="cpu")[None]
        weight_ED = interpolate(identity_1EE, student_width, align_corners=align_corners)[0]
        self.weight = nn.Parameter(weight_ED.T.contiguous())

    def forward(self, teacher_BLE: torch.Tensor) -> torch.Tensor:
        return F.linear(teacher_BLE, self.weight)


DIMENSION_MATCHES.register("interpolate", Interpolate)
DIMENSION_MATCHES.register("linear", LearnedLinear)
