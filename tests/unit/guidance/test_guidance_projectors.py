"""The state of matches that learn; `test_matrix.py` compares their training with plain PyTorch."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from let_plugin.alignment.losses import alignment_of, get_loss
from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import LearnedLinear, LeastSquares, Procrustes
from let_plugin.config import ProjectorConfig
from let_plugin.guidance.projectors import PROJECTOR, FittedProjector, FittedThenLearned, LearnedProjector
from let_plugin.runtime import checkpoint


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.Linear(4, 4), "1": nn.Linear(4, 4)})


@pytest.fixture
def part():
    torch.manual_seed(0)
    return Part()


def pair_of(match, side="teacher"):
    return PairAlignment(match, alignment_of(get_loss("cosine"), {}), side=side)


def learned(part, config, index=0):
    settings = config.let.projector
    return LearnedProjector(pair_of(LearnedLinear(3, 4)), part, "1", config, settings=settings, index=index)


def train(projector, steps, start=0):
    for step in range(start, start + steps):
        projector.start_step(step)
        generator = torch.Generator().manual_seed(step)
        for _ in range(2):  # microbatches
            projector._gradients["weight"].add_(torch.randn(projector._gradients["weight"].shape, generator=generator))
        projector.reduce()
        projector.finish_step()


def test_it_takes_the_settings_of_the_students_optimizer_for_its_name_or_its_own(part, config):
    group = config.optimizer.param_groups[0]
    biases = ParamGroupConfig(pattern=r"\.bias$", optimizer_name="AdamW", optimizer_kwargs={"lr": 1.0})
    others = dataclasses.replace(group, optimizer_kwargs={**group.optimizer_kwargs, "lr": 0.25})
    config.optimizer = OptimizersContainer.Config(param_groups=[biases, others])
    (optimizer,) = learned(part, config)._optimizers
    assert [len(g["params"]) for g in optimizer.param_groups] == [1]
    assert optimizer.param_groups[0]["initial_lr"] == 0.25

    config.let.projector = ProjectorConfig(lr_multiplier=3.0, weight_decay=0.0)
    (optimizer,) = learned(part, config, index=1)._optimizers
    assert optimizer.param_groups[0]["initial_lr"] == 0.75 and optimizer.param_groups[0]["weight_decay"] == 0
    assert others.optimizer_kwargs["weight_decay"] > 0  # the student's


def test_saved_and_restored_it_trains_on_as_if_nothing_had_happened(part, config, tmp_path):
    config.dump_folder = str(tmp_path)
    one = learned(part, config)
    train(one, 2)
    dcp.save({one.name: one}, checkpoint_id=str(tmp_path / config.checkpoint.folder / "step-2"), no_dist=True)
    train(one, 2, start=2)

    part_again = Part()
    again = learned(part_again, config)
    checkpoint.restore(again.name, again, config, 2)
    train(again, 2, start=2)
    assert torch.equal(part_again.get_parameter(f"{PROJECTOR}_0.weight"), part.get_parameter(f"{PROJECTOR}_0.weight"))


def fitted(part, config, match, side="teacher"):
    return FittedProjector(pair_of(match, side), part, "0", config, index=0)


def fit_step(projector, number):
    """The student's states are a rotated copy of the teacher's. Returns the rotation."""
    projector.start_step(number)
    rotation_DE = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(99))).Q
    teacher_BLE = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(number))
    teacher_BLE[0, 3:9] = 0  # these do not count
    student_BLD = teacher_BLE @ rotation_DE.T
    student_BLD[0, 3:9] = 100.0
    pair = getattr(projector, "_fitted", projector)._pair
    for row in range(2):  # microbatches
        pair(student_BLD[row : row + 1], teacher_BLE[row : row + 1], torch.tensor(0.0))
    projector.reduce()
    projector.finish_step()
    return rotation_DE


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_it_finds_the_rotation_between_the_two_in_every_so_many_steps(part, config, side):
    match = Procrustes(*((4, 6) if side == "teacher" else (6, 4)), refit_every=2)
    projector, address, weights = fitted(part, config, match, side), match.weight.data_ptr(), []
    for number in range(3):
        rotation_DE = fit_step(projector, number)
        weights.append(match.weight.detach().clone())
    torch.testing.assert_close(weights[0], rotation_DE if side == "teacher" else rotation_DE.T, rtol=1e-4, atol=1e-5)
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[0])
    assert match.weight.data_ptr() == address


def test_one_that_is_fitted_first_is_trained_from_there(part, config):
    """In the steps of the fit no gradient moves it, and the settings of the optimizer hold as for any other."""
    match, again = (LeastSquares(4, 6, fit_steps=2, then="learned") for _ in range(2))
    arguments = {"settings": config.let.projector, "index": 0}
    projector = FittedThenLearned(pair_of(match), part, "0", config, **arguments)
    for number in range(2):
        rotation_DE = fit_step(projector, number)
        assert part.get_parameter(f"{PROJECTOR}_0.weight").grad is None
    weight = part.get_parameter(f"{PROJECTOR}_0.weight")
    torch.testing.assert_close(weight.detach(), rotation_DE, rtol=0, atol=0.01)  # the ridge's share
    fitted_DE = weight.detach().clone()
    train(projector, 1, start=2)
    assert weight.grad is not None and 0 < (weight - fitted_DE).norm() < 0.1
    resumed = FittedThenLearned(pair_of(again), other := Part(), "0", config, **arguments)
    for number in range(2):
        fit_step(resumed, number)
        resumed.state_dict()  # a checkpoint within the fit leaves no trace
    train(resumed, 1, start=2)
    assert torch.equal(other.get_parameter(f"{PROJECTOR}_0.weight"), weight)
    resumed.load_state_dict(copy.deepcopy(projector.state_dict()))
    assert torch.equal(again.weight, match.weight) and torch.equal(again.sums, match.sums)
    projector.remove()
    assert not list(part.buffers()) and len(list(part.parameters())) == 4
