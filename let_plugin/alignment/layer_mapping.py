"""Which blocks of the student meet which layers of the teacher.

Depth is a fraction of the number of blocks: the block "at" 1/3 is the last one that ends at one third of the depth or
before. The letters are the paper's: Early, Middle, Late; the first is the teacher's, the second the student's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from let_plugin.alignment.registry import Registry

# The teacher's layer of that name: what enters its first block.
EMBEDDING: Literal["embedding"] = "embedding"


@dataclass(frozen=True)
class LayerPair:
    """The output of student block `student` is aligned with the teacher's layer `teacher`."""

    student: int  # 0-based index of a block
    teacher: int | str = -1  # that of a block, whose output it is; negative: from the end; or `EMBEDDING`
    weight: float = 1.0  # factor of this pair's loss, beside lambda


class LayerMapping(Protocol):
    """A strategy: from the numbers of blocks of both models to the pairs that are aligned.

    Options are keyword-only arguments with defaults. ValueError for a bad one, in a message that begins with its name.
    """

    def __call__(self, student_depth: int, teacher_depth: int) -> Sequence[LayerPair]: ...


LAYER_MAPPINGS: Registry[LayerMapping] = Registry("layer mapping", "let_plugin.layer_mappings")


def register_layer_mapping(name: str, mapping: LayerMapping) -> None:
    """Makes `let.layer_mapping = name` mean `mapping`. ValueError if the name is taken."""
    LAYER_MAPPINGS.register(name, mapping)


def block_at_depth(num_blocks: int, depth: float) -> int:
    """0-based index of the last block that ends at `depth` (a fraction of all blocks) or before; at least the first."""
    exact = Fraction(depth).limit_denominator(1000)  # 1/3 as a float is a little less than a third
    return max(num_blocks * exact.numerator // exact.denominator, 1) - 1


def _of_letters(teacher_letter: str, student_letter: str) -> Callable[..., list[LayerPair]]:
    def mapping(
        student_depth: int, teacher_depth: int, *, early: float = 1 / 3, middle: float = 2 / 3, late: float = 1.0
    ) -> list[LayerPair]:
        depths = {"early": early, "middle": middle, "late": late}
        for name, depth in depths.items():
            if not 0 < depth <= 1:
                raise ValueError(f"{name} must be a depth between 0 (not included) and 1")
        by_letter = {name[0].upper(): depth for name, depth in depths.items()}
        student = block_at_depth(student_depth, by_letter[student_letter])
        return [LayerPair(student, block_at_depth(teacher_depth, by_letter[teacher_letter]))]

    return mapping


def uniform(student_depth: int, teacher_depth: int, *, num_pairs: int = 4) -> list[LayerPair]:
    """`num_pairs` pairs at equal distances, each of the same relative depth in both models, weighing 1 together.

    Fewer, if one of the models has fewer blocks. The last pair is that of the last layers.
    """
    if num_pairs < 1:
        raise ValueError("num_pairs must be at least 1")
    count = min(num_pairs, student_depth, teacher_depth)
    return [
        LayerPair(block_at_depth(student_depth, i / count), block_at_depth(teacher_depth, i / count), 1 / count)
        for i in range(1, count + 1)
    ]


for _teacher in "LM":
    for _student in "EML":
        register_layer_mapping(f"{_teacher}2{_student}", _of_letters(_teacher, _student))
register_layer_mapping("uniform", uniform)
