"""How the teacher's width becomes the student's.

Shape legend: B batch, L sequence, D student width, E teacher width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from let_plugin.registry import Registry


class DimensionMatch(Protocol):
    """[B, L, E] -> [B, L, D], in the input's dtype."""

    def __call__(self, teacher_BLE: torch.Tensor, width: int, *, align_corners: bool) -> torch.Tensor: ...


DIMENSION_MATCHES: Registry[DimensionMatch] = Registry("dimension match", "let_plugin.dimension_matches")


def interpolate(teacher_BLE: torch.Tensor, width: int, *, align_corners: bool = False) -> torch.Tensor:
    """1-D linear interpolation along the channels (LET); the identity when the widths are equal."""
    if teacher_BLE.shape[-1] == width:
        return teacher_BLE
    # F.interpolate reads [N, C, W]: the sequence stands where it expects channels, each token is resampled alone.
    return F.interpolate(teacher_BLE, size=width, mode="linear", align_corners=align_corners)


DIMENSION_MATCHES.register("interpolate", interpolate)
