"""The algebra of a shared basis, on odd shapes."""

import pytest
import torch

from let_plugin.alignment.projectors import DIMENSION_MATCHES
from let_plugin.alignment.shared_basis import shared_basis

FIXED = ("interpolate", "random", "truncate_or_pad")
SHAPES = [(5, 13), (13, 5), (7, 7), (1, 3)]  # the teacher's width, the student's


def basis_of(name, teacher_width, student_width, side="teacher"):
    ends = (teacher_width, student_width) if side == "teacher" else (student_width, teacher_width)
    match = DIMENSION_MATCHES.get(name)(*ends)
    return match, shared_basis(match, ends[0], side=side)


def rms_norm(states):
    return states / states.square().mean(dim=-1, keepdim=True).sqrt()


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_map_of_the_alignment_and_its_pseudo_inverse(name, side, shape):
    match, (into_DE, back_ED) = basis_of(name, *shape, side)
    assert into_DE.shape == shape[::-1] and back_ED.shape == shape
    for one, other in ((into_DE, back_ED), (back_ED, into_DE)):
        torch.testing.assert_close(one @ other @ one, one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((one @ other).T, one @ other, rtol=1e-5, atol=1e-5)
    matrix = into_DE if side == "teacher" else back_ED
    states = torch.randn(2, 3, matrix.shape[1])
    torch.testing.assert_close(states @ matrix.T, match(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"), [("random", (5, 13)), ("truncate_or_pad", (5, 13)), ("interpolate", (7, 7))]
)
def test_a_head_reads_what_the_teachers_does_behind_the_students_norm(name, shape):
    _, basis = basis_of(name, *shape)
    states_TE, head_VE = torch.randn(4, shape[0]), torch.randn(11, shape[0])
    student_head_VD = basis.logit_scale * head_VE @ basis.back_ED
    logits_TV = rms_norm(states_TE @ basis.into_DE.T) @ student_head_VD.T
    torch.testing.assert_close(logits_TV, rms_norm(states_TE) @ head_VE.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "mlp", "orthogonal", "procrustes"])
def test_a_map_that_changes_or_is_none_is_refused(name):
    with pytest.raises(ValueError, match="changes while the run goes on"):
        basis_of(name, 5, 13)
    with pytest.raises(ValueError, match="not linear"):
        shared_basis(torch.nn.SiLU(), 5, side="teacher")
