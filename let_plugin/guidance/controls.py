"""Controls that keep everything of a teacher but its knowledge: is a gain what the teacher knows?

* Random weights: the same model, whose matrices are drawn anew, with the mean and the standard deviation that each had.
* Shuffled targets: the teacher's own states, each given to another token of the batch.

Shape legend: B batch (this rank's rows), L sequence, E teacher width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from let_plugin.teacher.base import StateProvider, States


@torch.no_grad()
def randomize_weights(teacher: nn.Module, *, seed: int = 0) -> None:
    """Draws every parameter with two or more dimensions anew: normal, with its own mean and standard deviation.

    Norms' weights and biases stay. Each tensor is drawn as a whole from a generator of its own, on the CPU, so it is
    the same in every layout.
    """
    for number, parameter in enumerate(teacher.parameters()):
        if parameter.ndim < 2:
            continue
        values = parameter.float()
        mean = values.mean()
        deviation = (values.square().mean() - mean.square()).sqrt()
        mean, deviation = (x.full_tensor() if isinstance(x, DTensor) else x for x in (mean, deviation))
        drawn = _drawn(parameter.shape, mean, deviation, seed * 1_000_003 + number).to(parameter)
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every rank has the whole tensor, and keeps its shard of it.
            drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(drawn)


def _drawn(shape: torch.Size, mean: torch.Tensor, deviation: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(mean.device) * deviation + mean


def without_knowledge(layers: dict[str, torch.Tensor], control: str) -> dict[str, torch.Tensor]:
    """What a control makes of the teacher's embeddings and head, [V, E] each, fp32.

    Of a random teacher, normal, with the mean and the standard deviation that each had, and drawn alike, as those of a
    teacher that ties them. Shuffled, each row is that of another token, the same in both.
    """
    if control == "random_teacher":
        return {name: _drawn(x.shape, x.mean(), x.std(), seed=0) for name, x in layers.items()}
    if control == "shuffled_targets":
        num_rows = len(next(iter(layers.values())))
        order_V = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0), device="cpu")
        return {name: x[order_V.to(x.device)] for name, x in layers.items()}
    return layers


class ShuffledStates(StateProvider):
    """Gives each token the state of a random other token of the same microbatch of this rank.

    The permutation is a function of the step, the microbatch and `seed`, the data-parallel rank: ranks with the same
    tokens draw alike, and so does a resumed run.
    """

    def __init__(self, inner: StateProvider, *, seed: int) -> None:
        self._inner = inner
        self._seed = seed
        self._step = 0
        self._microbatch = 0
        self.make_extras, self.teacher = inner.make_extras, inner.teacher

    def start_step(self, step: int) -> None:
        self._step, self._microbatch = step, 0
        self._inner.start_step(step)

    def states(self, batch: Mapping[str, torch.Tensor], student_masks: Any = None) -> States:
        states_BLE, known_BL, num_tokens = self._inner.states(batch, student_masks)
        device = states_BLE.device
        generator = torch.Generator(device)
        # 32 bits: the CPU's generator ignores more.
        mixed = np.random.SeedSequence((self._seed, self._step, self._microbatch)).generate_state(1)
        generator.manual_seed(int(mixed[0]))
        self._microbatch += 1
        cycle_T = torch.randperm(states_BLE.shape[:2].numel(), generator=generator, device=device)
        order_T = torch.empty_like(cycle_T)
        order_T[cycle_T] = cycle_T.roll(1)  # one cycle through all tokens: no token keeps its own
        if known_BL is not None:
            known_BL = known_BL.flatten()[order_T].view_as(known_BL)
        return States(states_BLE.flatten(0, 1)[order_T].view_as(states_BLE), known_BL, num_tokens)
