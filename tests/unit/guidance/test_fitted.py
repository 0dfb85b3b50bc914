"""The state of a fitted match, in one process; `tests/integration/test_strategies.py` has it on several."""

import pytest
import torch
from torch import nn

from let_plugin.alignment.losses import alignment_of, get_loss
from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import Procrustes
from let_plugin.guidance.projectors import PROJECTOR, FittedProjector


@pytest.fixture
def part():
    part = nn.Module()
    part.layers = nn.ModuleDict({"0": nn.Linear(6, 6)})
    return part


def fitted(part, config, match, side="teacher"):
    pair = PairAlignment(match, alignment_of(get_loss("cosine"), {}), side=side)
    return FittedProjector(pair, part, "0", config, index=0)


def states(step, student_width=6, teacher_width=4):
    """A rotated copy of the teacher's states is the student's."""
    generator = torch.Generator().manual_seed(step)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(99))).Q
    teacher_BLE = torch.randn(2, 20, teacher_width, generator=generator)
    teacher_BLE[0, 3:9] = 0  # these do not count
    student_BLD = teacher_BLE @ rotation[:student_width, :teacher_width].T
    student_BLD[0, 3:9] = 100.0
    return student_BLD, teacher_BLE, rotation[:student_width, :teacher_width]


def step(projector, number):
    projector.start_step(number)
    student_BLD, teacher_BLE, rotation_DE = states(number)
    for row in range(2):  # microbatches
        projector._pair(student_BLD[row : row + 1], teacher_BLE[row : row + 1], torch.tensor(0.0))
    projector.reduce()
    projector.finish_step()
    return rotation_DE


def test_it_finds_the_rotation_between_the_two(part, config):
    match = Procrustes(4, 6)
    rotation_DE = step(fitted(part, config, match), 0)
    torch.testing.assert_close(match.weight.detach(), rotation_DE, rtol=1e-4, atol=1e-5)


def test_on_the_students_side_it_finds_the_way_back(part, config):
    match = Procrustes(6, 4)
    rotation_DE = step(fitted(part, config, match, side="student"), 0)
    torch.testing.assert_close(match.weight.detach(), rotation_DE.T, rtol=1e-4, atol=1e-5)


def test_it_is_refitted_in_every_so_many_steps_only(part, config):
    match = Procrustes(4, 6, refit_every=3)
    projector = fitted(part, config, match)
    address, weights = match.weight.data_ptr(), []
    for number in range(7):
        before = match.weight.detach().clone()
        step(projector, number)
        weights.append(not torch.equal(match.weight, before))
    assert weights[0] and [i for i, changed in enumerate(weights) if not changed and i % 3] == [1, 2, 4, 5]
    assert match.weight.data_ptr() == address


def test_saved_and_restored(part, config):
    match, again = Procrustes(4, 6), Procrustes(4, 6)
    projector = fitted(part, config, match)
    step(projector, 0)
    state = {name: value.clone() for name, value in projector.state_dict().items()}
    other = nn.Module()
    other.layers = nn.ModuleDict({"0": nn.Linear(6, 6)})
    fitted(other, config, again).load_state_dict(state)
    assert torch.equal(again.weight, match.weight)


def test_it_is_in_no_state_dict_of_the_student_and_leaves_no_trace(part, config):
    keys = list(part.state_dict())
    projector = fitted(part, config, Procrustes(4, 6))
    assert list(part.state_dict()) == keys
    assert [name for name, _ in part.named_buffers()] == [f"{PROJECTOR}_0"]
    assert not any(PROJECTOR in name for name, _ in part.named_parameters())  # nothing for the clipping
    projector.remove()
    assert not list(part.buffers())
