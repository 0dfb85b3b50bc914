"""A layer mapping, a loss and a schedule of one's own."""

import torch
import torch.nn.functional as F

from let_plugin import LayerPair


def first_and_last(student_depth, teacher_depth, *, share: float = 0.5):
    """The teacher's last layer, with the student's first block and its last."""
    if not 0 <= share <= 1:
        raise ValueError("share must be between 0 and 1")
    return [LayerPair(0, -1, share), LayerPair(student_depth - 1, -1, 1 - share)]


def angle(student_BLD, target_BLD):
    """The angle between the two, in half turns."""
    cosine_BL = F.cosine_similarity(student_BLD, target_BLD, dim=-1)
    return torch.acos(cosine_BL.clamp(-1 + 1e-6, 1 - 1e-6)) / torch.pi


def polynomial(step, *, stop_step, power: float = 2.0):
    return max(0.0, 1 - step / stop_step) ** power if stop_step > 0 else 0.0
