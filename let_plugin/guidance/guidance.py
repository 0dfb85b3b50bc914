"""Everything that exists only while alignment is active: created at the first step that needs it, released at S_stop.

The trainer calls `start_step`, then for each microbatch `target`, then `finish_step`. Under pipeline parallelism only
the ranks whose stage holds an aligned block have a teacher; the others take part in what is collective.

Shape legend: B batch, L sequence, E teacher width, S the part of the sequence that this rank's block output covers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torch.profiler import record_function
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.trainer import Trainer

from let_plugin.alignment.gradient_weight import GradientWeight
from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import FittedMatch
from let_plugin.alignment.running_mean import RunningMean
from let_plugin.alignment.tap import AlignmentTap, PairFunction
from let_plugin.config import plan
from let_plugin.guidance.controls import ShuffledStates, randomize_weights
from let_plugin.guidance.heads import AuxiliaryHead, TeacherHead, cross_entropy, distillation_from
from let_plugin.guidance.metrics import DeviceTimer
from let_plugin.guidance.projectors import FittedProjector, LearnedProjector
from let_plugin.runtime import checkpoint
from let_plugin.runtime.batch_extras import BatchExtras
from let_plugin.teacher.base import StateProvider, Teacher, TeacherInfo, TeacherSource
from let_plugin.teacher.open import make_provider, open_source
from let_plugin.teacher.sharding import TargetProvider, TeacherShare, sequence_shards, teacher_parallel_dims
from let_plugin.teacher.stored.features import Features

TARGET_RANGE = "let: target"  # in a profile; the teacher and the tap have their own
CENTER = "let_center"  # the running mean's state in a checkpoint
GRADIENT_WEIGHT = "let_gradient_weight"  # and that of a weight that is measured
_Batch = tuple[dict[str, torch.Tensor], torch.Tensor]  # inputs, labels
# What is logged of the loss, by `let.target`.
METRIC_OF_TARGET = {"teacher": "let/cosine", "labels": "let/auxiliary_loss", "logits": "let/distillation_loss"}


class Guidance:
    """The teacher, the taps and, where they learn, the projectors. Every rank of the job makes one, at the same step.

    `steps_taken` is more than 0 if the run has resumed.

    Attributes:
        pairs: What is aligned, on all ranks together.
        taps: One for each part of the student on this rank, if any of them holds an aligned block; else none.
        projectors: Those of this rank's pairs that learn or are fitted.
    """

    def __init__(self, trainer: Trainer, steps_taken: int) -> None:
        config, dims, device = trainer.config, trainer.parallel_dims, trainer.device
        self.taps: list[AlignmentTap] = []
        self.projectors: list[LearnedProjector | FittedProjector] = []
        self._trainer = trainer
        self._steps_taken = steps_taken
        self._provider: TargetProvider | None = None
        self._extras: BatchExtras | None = None
        self._head: AuxiliaryHead | None = None
        self._center: RunningMean | None = None
        self._kept: list[str] = []  # names of states in the run's checkpoints
        self._num_accumulations_left = 0
        self._lambda = torch.zeros((), device=device)
        self._measures = False
        self._valid_tokens = torch.ones((), device=device)  # of the step, of the rows that have a target
        self._num_targets: torch.Tensor | None = None  # of them, this data-parallel rank's, until they are reduced
        self._timer = DeviceTimer(device)
        # Ranks that align the same part of the same rows: tensor-parallel ones without sequence parallelism.
        self._num_replicas = dims.cp * dims.tp // sequence_shards(config, dims)

        source = None if config.let.target == "labels" else open_source(config.let.teacher)
        self.pairs = plan.pairs(config, source.info.num_layers if source else None)
        # Of each part, block by block: the order in which a tap sums their cosines.
        by_block = sorted(range(len(self.pairs)), key=lambda i: self.pairs[i].student)
        self._pairs_of_taps = [
            [i for i in by_block if str(self.pairs[i].student) in part.layers] for part in trainer.model_parts
        ]
        self._deepest_block = str(self.pairs[by_block[-1]].student)
        self._gradient_weight: GradientWeight | None = None
        if config.let.weight_by == "gradient":
            self._gradient_weight = GradientWeight(momentum=config.let.weight_momentum, device=device)
            self._lambda = self._gradient_weight.value
            self._keep(GRADIENT_WEIGHT, self._gradient_weight, [int(self._deepest_block)])

        # All ranks of the job communicate here, in this order. Only then a rank without an aligned block may skip the
        # teacher, whose building is collective among the ranks of one pipeline stage alone.
        teacher_dims = teacher_parallel_dims(dims, tensor_parallel=config.let.teacher.tensor_parallel)
        teacher_dims.build_mesh()
        self._share = TeacherShare(config, dims, device)
        if config.let.target != "teacher":
            self._head = AuxiliaryHead(trainer)

        if source is None:
            self._attach(lambda i, part: self._head_pair(i, cross_entropy))
            return
        self._center = self._make_center(source.info)
        if any(self._pairs_of_taps):
            self._add_teacher(source, teacher_dims)

    def _add_teacher(self, source: TeacherSource | Features, teacher_dims: Any) -> None:
        config, device = self._trainer.config, self._trainer.device
        own_pairs = [self.pairs[i] for indices in self._pairs_of_taps for i in indices]
        layers = plan.teacher_layers(own_pairs)
        tokenizer = self._trainer.tokenizer
        provider = make_provider(
            source, config=config, student_tokenizer=tokenizer, device=device, parallel_dims=teacher_dims, layers=layers
        )
        states = self._with_control(provider)
        places = self._channels(source.info, plan.teacher_layers(self.pairs))
        channels_E = torch.cat([torch.arange(places[i].start, places[i].stop, device=device) for i in layers])
        self._provider = TargetProvider(
            states,
            self._share,
            center=self._center,
            center_channels_E=channels_E,
            timer=self._timer,
            let=config.let,
        )
        if states.make_extras is not None:
            self._extras = BatchExtras(self._trainer.dataloader, states.make_extras)
        if config.let.target == "logits":
            assert isinstance(source, TeacherSource) and states.teacher is not None
            head = TeacherHead(source, states.teacher, dtype=plan.teacher_dtype(config), device=device)
            loss = distillation_from(head, temperature=config.let.temperature)
            self._attach(lambda i, part: self._head_pair(i, loss))
        else:
            channels = self._channels(source.info, layers)
            self._attach(lambda i, part: self._pair(i, part, channels[self.pairs[i].teacher]))

    def start_step(self, weight: float, *, measures: bool = False) -> None:
        """Before a step's first microbatch: `let.weight` by then, and whether its metrics compare the two gradients."""
        self._measures = measures
        if self._gradient_weight is None:
            self._lambda.fill_(weight)
        else:
            self._gradient_weight.start_step(weight)
        self._num_accumulations_left = self._trainer.gradient_accumulation_steps
        for tap in self.taps:
            tap.reset()
            tap.measured_block = self._deepest_block if measures or self._gradient_weight else None
        for part in (self._provider, *self._learners):
            if part is not None:
                part.start_step(self._trainer.step - 1)

    def counted(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The batches of a step, of which the tokens of the rows that have a target are counted on the way."""
        return batches if self._trainer.config.let.teacher.rows == 1 else self._counted(batches)

    def _counted(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        let = self._trainer.config.let
        self._num_targets = torch.zeros((), dtype=torch.int64)
        for input_dict, labels_BL in batches:
            rows = plan.teacher_rows(let, self._trainer.step - 1, len(labels_BL))
            self._num_targets += (labels_BL[rows] != IGNORE_INDEX).sum()
            yield input_dict, labels_BL

    @contextmanager
    def microbatches(self, global_valid_tokens: torch.Tensor) -> Iterator[None]:
        """Around a forward and backward pass; the number, 0-dim, is of all ranks' tokens that count in the step."""
        if self._trainer.config.let.teacher.rows == 1:
            self._valid_tokens = global_valid_tokens
        elif self._num_targets is not None:  # of all microbatches of the step, before the first
            self._valid_tokens, self._num_targets = self._num_targets.to(self._trainer.device), None
            if self._trainer.parallel_dims.dp_enabled:
                mesh = self._trainer.parallel_dims.get_mesh("batch")
                self._valid_tokens = dist_utils.dist_sum_tensor(self._valid_tokens, mesh)
            self._valid_tokens = self._valid_tokens.clamp_min(1)
        for tap in self.taps:
            tap.coefficient.copy_(self._lambda).div_(self._valid_tokens)
        yield
        self._num_accumulations_left -= 1
        if self._num_accumulations_left == 0:
            for learner in self._learners:
                learner.reduce()

    @property
    def teacher(self) -> Teacher | None:
        """None on the ranks whose pipeline stages hold no aligned block, and if nothing runs one."""
        return None if self._provider is None else self._provider.states.teacher

    @property
    def _learners(self) -> list[LearnedProjector | FittedProjector | AuxiliaryHead]:
        return [*self.projectors, *([] if self._head is None else [self._head])]

    @torch.no_grad()
    @record_function(TARGET_RANGE)
    def target(
        self,
        input_dict: Mapping[str, torch.Tensor],
        labels_BL: torch.Tensor,
        extras: Mapping[str, torch.Tensor] | None = None,
        student_masks: Any = None,
    ) -> torch.Tensor | None:
        """The target of a microbatch, for this rank's part of the sequence; None on a rank without an aligned block.

        The teacher's states, [B, S, E], as TargetProvider.target makes them; or the labels, [B, S]. `input_dict` has
        "input", token ids, and, for packed documents, "positions", of whole sequences, [B, L]; `extras` is what the
        data loader has added for LET, `student_masks` the attention masks that the student will run with.
        """
        if self._trainer.config.let.target == "labels":
            return self._share.part(labels_BL)
        if self._provider is None:
            return None
        batch = {name: input_dict[name] for name in ("input", "positions") if name in input_dict}
        return self._provider.target({**batch, **(extras or {})}, labels_BL, student_masks)

    def finish_step(self) -> None:
        """After the student's optimizer step. RuntimeError if the gradient of the alignment has reached no block."""
        for learner in self._learners:
            learner.finish_step()
        if self._center is not None:
            # A channel's layer may be on several pipeline stages, and on others not at all.
            torch.distributed.all_reduce(self._center.sums)
            self._center.finish_step()
        if self._gradient_weight is not None:
            sums = sum((tap.gradient_sums for tap in self.taps), start=torch.zeros(3, device=self._trainer.device))
            torch.distributed.all_reduce(sums)
            self._gradient_weight.finish_step(sums)
        for tap in self.taps:
            for block, num_calls in tap.num_calls.items():
                if num_calls == 0:
                    raise RuntimeError(
                        f"LET: the tap was not reached in a training step: the hooks of layers.{block} did not run"
                    )

    def metrics(self) -> dict[str, float]:
        """What the step has measured, over all ranks and valid tokens. Every rank must call it.

        Returns:
            let/cosine: mean cosine of the tokens that have a state of the teacher's; of several pairs, their mean, and
                each pair's own beside it. let/auxiliary_loss or let/distillation_loss for another target.
            let/lambda: if it is measured (`let.weight_by`).
            let/aligned_fraction: the share of the valid tokens that have one, unless all do by construction.
            let/grad_cosine, let/grad_ratio: cosine between the gradients of lambda * L_align and of the student's own
                loss with respect to the deepest aligned hidden state, and the ratio of their norms, if compared.
            let/teacher_tokens_per_second: of the teacher's forward pass alone, per rank that has one.
        """
        cosines = self._valid_tokens.new_zeros(len(self.pairs), dtype=torch.float64)
        for tap, indices in zip(self.taps, self._pairs_of_taps, strict=bool(self.taps)):
            cosines[indices] = tap.metric_sums.double() / self._valid_tokens / self._num_replicas
        speed, coverage = cosines.new_tensor([0.0, self._timer.pop()]), cosines.new_zeros(2)
        if self._provider is not None:
            speed[0], coverage = self._provider.num_tokens, self._provider.coverage.double()
            self._provider.num_tokens = 0
        gradients = sum((tap.gradient_sums for tap in self.taps), start=cosines.new_zeros(3))
        totals = torch.cat([cosines, speed, gradients, coverage])
        torch.distributed.all_reduce(totals)
        *means, tokens, seconds, dot, own, added, num_aligned, num_counted = totals.tolist()
        if num_counted:
            # Sums over the tokens that have a state, divided by the number of all that count.
            means = [mean * num_counted / max(num_aligned, 1) for mean in means]
        target = self._trainer.config.let.target
        metrics = {METRIC_OF_TARGET[target]: sum(means) / len(means)}
        if target != "labels":
            metrics["let/teacher_tokens_per_second"] = tokens / seconds if seconds > 0 else 0.0
            if len(means) > 1:
                names = [f"let/cosine/{pair.student}-{pair.teacher}" for pair in self.pairs]
                metrics |= dict(zip(names, means, strict=True))
            if num_counted:
                metrics["let/aligned_fraction"] = num_aligned / num_counted
        if self._gradient_weight is not None:
            metrics["let/lambda"] = self._lambda.item()
        if self._measures and own > 0 and added > 0:
            metrics |= {"let/grad_cosine": dot / math.sqrt(own * added), "let/grad_ratio": math.sqrt(added / own)}
        return metrics

    def remove(self) -> None:
        """Leaves no trace on the student, its trainer and its checkpoints."""
        for part in (*self.taps, *self._learners):
            part.remove()
        for name in self._kept:
            del self._trainer.checkpointer.states[name]
        if self._extras is not None:
            self._extras.stop()
        self._provider, self.taps, self.projectors, self._head, self._center = None, [], [], None, None

    def _with_control(self, states: StateProvider) -> StateProvider:
        control, dims = self._trainer.config.let.control, self._trainer.parallel_dims
        if control == "random_teacher":
            assert states.teacher is not None
            randomize_weights(states.teacher)
        elif control == "shuffled_targets":
            return ShuffledStates(states, seed=dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0)
        return states

    def _attach(self, make_pair: Callable[[int, nn.Module], PairFunction]) -> None:
        """Puts a tap on each part of the student; `make_pair` makes a pair, by its number, there."""
        for part, indices in zip(self._trainer.model_parts, self._pairs_of_taps, strict=True):
            pairs: dict[str, list[PairFunction]] = {}
            for i in indices:
                pairs.setdefault(str(self.pairs[i].student), []).append(make_pair(i, part))
            # The alignment stays on this rank: torchtitan's check of how tensors are sharded does not apply to it.
            self.taps.append(AlignmentTap(part, pairs, self._trainer.device, context=spmd.no_typecheck))

    def _head_pair(self, index: int, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> PairFunction:
        assert self._head is not None
        return self._head.pair(loss, self.pairs[index].weight)

    def _pair(self, index: int, part: nn.Module, channels: slice) -> PairAlignment:
        config, spec = self._trainer.config, self.pairs[index]
        make_match = plan.dimension_match(config.let)
        match = make_match(channels.stop - channels.start, config.model_spec.model.dim).to(self._trainer.device)
        pair = plan.pair_alignment(config, match, channels=channels, weight=spec.weight)
        learns = any(parameter.requires_grad for parameter in match.parameters())
        if learns or isinstance(match, FittedMatch):
            kind = LearnedProjector if learns else FittedProjector
            projector = kind(pair, part, str(spec.student), config, index=index)
            self._keep(projector.name, projector, [spec.student, _number(spec.teacher)])
            self.projectors.append(projector)
        return pair

    def _make_center(self, teacher: TeacherInfo) -> RunningMean | None:
        """The mean of the teacher's states, of all layers that any rank asks for; every rank has all of it."""
        settings = self._trainer.config.let.teacher
        if not settings.center:
            return None
        layers = plan.teacher_layers(self.pairs)
        width = max(channels.stop for channels in self._channels(teacher, layers).values())
        center = RunningMean(width, momentum=settings.center_momentum, device=self._trainer.device)
        self._keep(CENTER, center, list(map(_number, layers)))
        return center

    def _keep(self, name: str, stateful: Any, identity: list[int]) -> None:
        """Restores a state if the run has resumed, and makes it a part of the run's checkpoints."""
        state = checkpoint.Identified(stateful, identity)
        if self._steps_taken > 0:
            checkpoint.restore(name, state, self._trainer.config, self._steps_taken)
        if self._trainer.config.checkpoint.enable:
            self._trainer.checkpointer.states[name] = state
            self._kept.append(name)

    def _channels(self, teacher: TeacherInfo, layers: Sequence[int | str]) -> dict[int | str, slice]:
        """Where each layer lies in the states that the teacher returns."""
        result, start = {}, 0
        for layer in layers:
            stop = start + teacher.width(layer, self._trainer.config.let.teacher.final_norm)
            result[layer], start = slice(start, stop), stop
        return result


def _number(layer: int | str) -> int:
    return layer if isinstance(layer, int) else -1
