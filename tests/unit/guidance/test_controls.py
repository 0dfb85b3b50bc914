"""What is taken from a teacher, and what stays."""

import copy

import torch

from let_plugin.alignment.tap import TARGET_KWARG
from let_plugin.guidance.controls import ShuffledStates, randomize_weights
from let_plugin.guidance.guidance import Guidance
from let_plugin.teacher.base import StateProvider, States


class Numbered(StateProvider):
    """Each token's state is its own number."""

    def __init__(self, known_BL=None):
        self.known_BL = known_BL

    def states(self, batch, student_masks=None):
        tokens_BL = batch["input"]
        numbers = torch.arange(tokens_BL.numel(), dtype=torch.float32).view_as(tokens_BL)
        return States(numbers[..., None].expand(*tokens_BL.shape, 3), self.known_BL, tokens_BL.numel())


BATCH = {"input": torch.zeros(4, 16, dtype=torch.int64)}


def draws(seed, steps, known_BL=None):
    provider = ShuffledStates(Numbered(known_BL), seed=seed)
    result = []
    for step in steps:
        provider.start_step(step)
        result += [provider.states(BATCH) for _ in range(2)]
    return result


def test_shuffled_states_are_all_there_in_another_order_each_time_and_the_same_when_resumed():
    known_BL = torch.arange(64).view(4, 16) % 3 == 0
    drawn = draws(0, [3, 4], known_BL)
    for states in drawn:
        numbers_BL = states.states_BLE[..., 0]
        assert torch.equal(numbers_BL.flatten().sort().values, torch.arange(64.0))
        assert not torch.any(numbers_BL.flatten() == torch.arange(64.0))  # no token keeps its own
        assert torch.equal(states.known_BL, numbers_BL % 3 == 0)  # that of the token whose state it is
    for one, other in zip(drawn[2:], draws(0, [4]), strict=True):
        assert torch.equal(one.states_BLE, other.states_BLE)
    assert len({tuple(states.states_BLE[..., 0].flatten().tolist()) for states in [*drawn, *draws(1, [3])]}) == 6


def test_matrices_are_drawn_anew_with_their_own_scale(trainer):
    teacher = Guidance(trainer, trainer.terms, 0).teacher
    before = copy.deepcopy(dict(teacher.named_parameters()))
    randomize_weights(teacher)
    again = {name: p.clone() for name, p in teacher.named_parameters()}
    for name, parameter in again.items():
        if parameter.ndim < 2:
            assert torch.equal(parameter, before[name])
            continue
        flat = torch.stack([parameter.flatten(), before[name].flatten()]).float()
        assert torch.corrcoef(flat)[0, 1].abs() < 0.1, name
        torch.testing.assert_close(flat[0].std(), flat[1].std(), rtol=0.05, atol=0)
    randomize_weights(teacher)
    assert not any((p - again[name]).abs().max() > 0.2 for name, p in teacher.named_parameters())  # same numbers drawn


def test_the_controls_are_switched_on_by_their_names(trainer, batch):
    trainer.step = 1
    states = {}
    for control in ("none", "random_teacher", "shuffled_targets"):
        trainer.config.let.control = control
        guidance = Guidance(trainer, trainer.terms, 0)
        guidance.start_step()
        states[control] = guidance.targets(*batch)[TARGET_KWARG]
        guidance.end()
    real, random, shuffled = states.values()
    counts_BL = real.any(dim=-1)
    assert not torch.allclose(real[counts_BL], random[counts_BL], atol=0.1)
    assert not torch.allclose(real[counts_BL], shuffled[counts_BL], atol=0.1)
