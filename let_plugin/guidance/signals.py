"""A term of the loss while it is active: where it touches the student on this rank, and what it measures.

Shape legend: see `guidance`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torchtitan.trainer import Trainer

from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import FittedMatch
from let_plugin.alignment.running_mean import GradientWeight
from let_plugin.alignment.tap import AlignmentTap, LogitTap, PairFunction, Tap
from let_plugin.config import plan
from let_plugin.guidance.distillation import Distillation
from let_plugin.guidance.heads import AuxiliaryHead
from let_plugin.guidance.projectors import FittedProjector, FittedThenLearned, LearnedProjector
from let_plugin.guidance.stopping import TermProgress
from let_plugin.teacher.sharding import sequence_shards

GRADIENT_WEIGHT = "let_gradient_weight"  # the state in a checkpoint of a weight that is measured

# What is logged of a term's loss, by its signal.
METRIC_OF_SIGNAL = {"states": "cosine", "labels": "auxiliary_loss", "logits": "distillation_loss"}

# (name, state, numbers of what it belongs to): makes a state a part of the run's checkpoints, and restores it.
Keep = Callable[[str, Any, Sequence[int]], None]


class Signal:
    """One term, from its first step to its last. Every rank of the job makes one, at the same step.

    `pairs` is what it brings together, on all ranks; `first_index` the number of the first among those of all terms.

    Attributes:
        pairs_of_parts: For each part of the student on this rank, the numbers of the pairs that it has; block by block.
        taps: One for each part, once a rank that has any pair has attached them.
        kept: Names of its states in the run's checkpoints.
        learners: What gathers and reduces weights and their gradients once a step, on this rank.
    """

    def __init__(
        self, trainer: Trainer, progress: TermProgress, pairs: Sequence[LayerPair], first_index: int, keep: Keep
    ) -> None:
        self.progress, self.term, self.pairs = progress, progress.term, pairs
        self.taps: list[Tap] = []
        self.learners: list[LearnedProjector | FittedProjector | AuxiliaryHead] = []
        self.kept: list[str] = []
        self._trainer, self._keep_state, self._first_index = trainer, keep, first_index
        self._kind, self._name = self.term.config.signal, f"_{self.term.name}" if self.term.name else ""
        dims, device = trainer.parallel_dims, trainer.device
        self._lambda = torch.zeros((), device=device)
        self._own_share = torch.ones((), device=device) if self.term.config.alpha > 0 else None
        self._valid_tokens = torch.ones((), device=device)
        self._measures = False
        # Ranks that measure the same tokens.
        num_parts = dims.cp if self._kind == "logits" else sequence_shards(trainer.config, dims)
        self._num_replicas = dims.cp * dims.tp // num_parts
        by_block = sorted(range(len(pairs)), key=lambda i: pairs[i].student)
        self.pairs_of_parts = [
            [i for i in by_block if str(pairs[i].student) in part.layers]
            if self._kind != "logits"
            else [0] * (part.lm_head is not None)
            for part in trainer.model_parts
        ]
        deepest = pairs[by_block[-1]].student
        self._measured_place = LogitTap.PLACE if self._kind == "logits" else str(deepest)
        self._gradient_weight: GradientWeight | None = None
        if self.term.config.weight_by == "gradient":
            self._gradient_weight = GradientWeight(momentum=self.term.config.weight_momentum, device=device)
            self._lambda = self._gradient_weight.value
            self._keep(f"{GRADIENT_WEIGHT}{self._name}", self._gradient_weight, [deepest])
        if self._kind == "labels":  # every rank takes part in it
            head = AuxiliaryHead(trainer, self._name)
            self.learners.append(head)
            self._attach_to_blocks(lambda i, part: head.pair(pairs[i].weight))

    @property
    def own_pairs(self) -> list[LayerPair]:
        """Those of this rank."""
        return [self.pairs[i] for indices in self.pairs_of_parts for i in indices]

    def attach_states(self, channels: dict[int | str, slice]) -> None:
        """Draws blocks to the teacher's layers, which lie in its states as `channels` says."""
        self._attach_to_blocks(lambda i, part: self._pair(i, part, channels[self.pairs[i].teacher]))

    def attach_logits(self, distillation: Distillation) -> None:
        """Draws the student's predictions to the teacher's."""
        for part in self._trainer.model_parts:
            self.taps.append(LogitTap(part, distillation, **self._tap_options()))

    def start_step(self, *, measures: bool) -> None:
        """Before a step's first microbatch; whether its metrics compare the two gradients."""
        self._measures = measures
        if self._gradient_weight is None:
            self._lambda.fill_(self.progress.weight)
        else:
            self._gradient_weight.start_step(self.progress.weight)
        if self._own_share is not None:
            self._own_share.fill_(1 - self.term.config.alpha * self.progress.fraction)
        for tap in self.taps:
            tap.reset()
            tap.measured = self._measured_place if measures or self._gradient_weight else None
        for learner in self.learners:
            learner.start_step(self._trainer.step - 1)

    def start_microbatch(self, valid_tokens: torch.Tensor) -> None:
        """Before a forward pass: the number, 0-dim, of all ranks' tokens of the step that may have a target."""
        self._valid_tokens = valid_tokens
        for tap in self.taps:
            tap.coefficient.copy_(self._lambda).div_(valid_tokens)

    def finish_step(self) -> None:
        """After the student's optimizer step. RuntimeError if the gradient has reached no part of the student."""
        for learner in self.learners:
            learner.finish_step()
        if self._gradient_weight is not None:
            sums = self._gradient_sums()
            torch.distributed.all_reduce(sums)
            self._gradient_weight.finish_step(sums)
        if lost := [place for tap in self.taps for place, num_calls in tap.num_calls.items() if num_calls == 0]:
            place = f"layers.{lost[0]}" if lost[0].isdecimal() else lost[0]
            raise RuntimeError(f"LET: the tap was not reached in a training step: the hooks of {place} did not run")

    def sums(self) -> torch.Tensor:
        """What `metrics` takes, of this rank, to be added up over all: fp64, of each pair, then of the gradients."""
        means = torch.zeros(len(self.pairs), dtype=torch.float64, device=self._trainer.device)
        for tap, indices in zip(self.taps, self.pairs_of_parts, strict=bool(self.taps)):
            if indices:
                means[indices] = tap.metric_sums.double() / self._valid_tokens / self._num_replicas
        return torch.cat([means, self._gradient_sums().double()])

    def metrics(self, sums: Sequence[float], coverage: float) -> dict[str, float]:
        """From the sums of all ranks, and the share of the tokens that have a state; names as in Guidance.metrics."""
        *means, dot, own, added = sums
        if self.term.has_teacher and coverage > 0:
            means = [mean / coverage for mean in means]
        metrics = {METRIC_OF_SIGNAL[self._kind]: sum(means) / len(means)}
        if self._kind == "states" and len(means) > 1:
            metrics |= {f"cosine/{p.student}-{p.teacher}": mean for p, mean in zip(self.pairs, means, strict=True)}
        if self._measures and own > 0 and added > 0:
            metrics |= {"grad_cosine": dot / math.sqrt(own * added), "grad_ratio": math.sqrt(added / own)}
        metrics["lambda"] = self.progress.weight if self._gradient_weight is None else self._lambda.item()
        return {self.term.metric(name): value for name, value in metrics.items()}

    def remove(self) -> None:
        """Leaves no trace on the student."""
        for part in (*self.taps, *self.learners):
            part.remove()
        self.taps, self.learners = [], []

    def _keep(self, name: str, stateful: Any, identity: Sequence[int]) -> None:
        self._keep_state(name, stateful, identity)
        self.kept.append(name)

    def _gradient_sums(self) -> torch.Tensor:
        return sum((tap.gradient_sums for tap in self.taps), start=torch.zeros(3, device=self._trainer.device))

    def _attach_to_blocks(self, make_pair: Callable[[int, nn.Module], PairFunction]) -> None:
        """Puts a tap on each part of the student; `make_pair` makes a pair, by its number, there."""
        for part, indices in zip(self._trainer.model_parts, self.pairs_of_parts, strict=True):
            pairs: dict[str, list[PairFunction]] = {}
            for i in indices:
                pairs.setdefault(str(self.pairs[i].student), []).append(make_pair(i, part))
            self.taps.append(AlignmentTap(part, pairs, **self._tap_options()))

    def _tap_options(self) -> dict[str, Any]:
        # What is added stays on this rank: torchtitan's check of how tensors are sharded does not apply to it.
        own = {"name": self._name, "context": spmd.no_typecheck, "own_share": self._own_share}
        return {"device": self._trainer.device, **own}

    def _pair(self, index: int, part: nn.Module, channels: slice) -> PairFunction:
        trainer, pair, term = self._trainer, self.pairs[index], self.term
        config: Any = trainer.config
        make_match = plan.dimension_match(term.config, term.key)
        match = make_match(channels.stop - channels.start, config.model_spec.model.dim).to(trainer.device)
        options: Any = {"dtype": getattr(torch, config.let.math_dtype), "compile_options": plan.compile_options(config)}
        options |= {"side": term.config.projector.side, "channels": channels, "weight": pair.weight}
        alignment = PairAlignment(match, plan.loss(term), **options)
        arguments: Any = (alignment, part, str(pair.student), config)
        index += self._first_index
        projector: LearnedProjector | FittedProjector
        if any(parameter.requires_grad for parameter in match.parameters()):
            kind = FittedThenLearned if isinstance(match, FittedMatch) else LearnedProjector
            projector = kind(*arguments, settings=term.config.projector, index=index)
        elif isinstance(match, FittedMatch):
            projector = FittedProjector(*arguments, index=index)
        else:
            return alignment
        self._keep(projector.name, projector, [pair.student, pair.teacher if isinstance(pair.teacher, int) else -1])
        self.learners.append(projector)
        return alignment
