"""Which block of the student meets which layer of the teacher."""

from dataclasses import dataclass
from typing import Protocol

from let_plugin.registry import Registry


@dataclass(frozen=True)
class LayerPair:
    """The output of student block `student` is aligned with the teacher's layer `teacher`.

    Attributes:
        student: 0-based index of a block of the student.
        teacher: Index of a layer of the teacher as Python counts; -1 is the last, after the final norm.
    """

    student: int
    teacher: int = -1


class LayerMapping(Protocol):
    """A strategy: from the numbers of blocks of both models to the pair that is aligned."""

    def __call__(self, student_depth: int, teacher_depth: int) -> LayerPair: ...


LAYER_MAPPINGS: Registry[LayerMapping] = Registry("layer mapping", "let_plugin.layer_mappings")


def block_at_depth(num_blocks: int, thirds: int) -> int:
    """0-based index of the block whose output lies at `thirds`/3 of the depth, or just before; at least the first."""
    return max(num_blocks * thirds // 3, 1) - 1


def late_to_early(student_depth: int, teacher_depth: int) -> LayerPair:
    """The teacher's last layer and the student's block at one third of its depth (the paper's L2E)."""
    return LayerPair(block_at_depth(student_depth, 1))


def late_to_middle(student_depth: int, teacher_depth: int) -> LayerPair:
    """The teacher's last layer and the student's block at two thirds of its depth."""
    return LayerPair(block_at_depth(student_depth, 2))


def late_to_late(student_depth: int, teacher_depth: int) -> LayerPair:
    """The teacher's last layer and the student's last block."""
    return LayerPair(block_at_depth(student_depth, 3))


LAYER_MAPPINGS.register("L2E", late_to_early)
LAYER_MAPPINGS.register("L2M", late_to_middle)
LAYER_MAPPINGS.register("L2L", late_to_late)
