"""What is there only while the teacher guides the student: made at the first step that needs it, gone at the stop.

The trainer calls `start_step`, then for each microbatch `target`, then `finish_step`. Under pipeline parallelism only
the ranks whose stage holds the aligned block have a teacher; the others take part in what is collective.

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
from torchtitan.trainer import Trainer

from let_plugin.alignment.losses import Alignment
from let_plugin.alignment.projectors import FittedMatch
from let_plugin.alignment.running_mean import RunningMean
from let_plugin.alignment.tap import Align, AlignmentTap
from let_plugin.config import plan
from let_plugin.guidance.auxiliary_head import AuxiliaryHead, LogitLoss, cross_entropy
from let_plugin.guidance.controls import ShuffledStates, randomise_weights
from let_plugin.guidance.distillation import TeacherHead, distillation_from
from let_plugin.guidance.fitted import FittedProjector
from let_plugin.guidance.learned import LearnedProjector
from let_plugin.guidance.metrics import DeviceTimer
from let_plugin.runtime import checkpoint
from let_plugin.runtime.batch_extras import BatchExtras
from let_plugin.teacher.base import Teacher, TeacherInfo, TeacherSource
from let_plugin.teacher.providers import make_provider, open_source
from let_plugin.teacher.sharding import TeacherShare, sequence_shards, teacher_parallel_dims
from let_plugin.teacher.states import StateProvider

# Names of ranges in a profile; the tap has its own.
TARGET_RANGE, TEACHER_RANGE, DELIVERY_RANGE = "let: target", "let: teacher", "let: delivery"

# What is logged of the loss, by `let.target`.
METRIC_OF_TARGET = {
    "teacher": "let/cosine",
    "labels": "let/auxiliary_loss",
    "logits": "let/distillation_loss",
}

# Name of the running mean's state in a checkpoint.
CENTER = "let_center"


class Guidance:
    """The teacher, the taps and, where they learn, the projectors. Every rank of the job makes one, at the same step.

    Args:
        trainer: The student's trainer; its `let` table says what to build.
        steps_taken: Optimizer steps taken so far; more than 0 if the run has resumed.

    Attributes:
        pairs: What is aligned, on all ranks together.
        teacher: None on the ranks whose pipeline stages hold no aligned block, and if nothing runs one.
        taps: One for each part of the student on this rank, if any of them holds an aligned block; else none.
        projectors: Those of this rank's pairs that learn or are fitted.
    """

    def __init__(self, trainer: Trainer, steps_taken: int) -> None:
        config, dims, device = trainer.config, trainer.parallel_dims, trainer.device
        self._provider: StateProvider | None = None
        self._extras: BatchExtras | None = None
        self.taps: list[AlignmentTap] = []
        self.projectors: list[LearnedProjector | FittedProjector] = []
        self._head: AuxiliaryHead | None = None
        self._center: RunningMean | None = None
        self._trainer = trainer
        self._num_accumulations_left = 0
        self._lambda = 0.0
        self._measures = False
        self._valid_tokens = torch.ones((), device=device)
        # Of the tokens that count in the loss: how many have a state, and how many there are, if not all have one.
        self._coverage = torch.zeros(2, dtype=torch.int64, device=device)
        self._timer = DeviceTimer(device)
        self._tokens = 0
        # Ranks that align the same part of the same rows: tensor-parallel ones without sequence parallelism.
        self._num_replicas = dims.cp * dims.tp // sequence_shards(config, dims)
        self._target_dtype = plan.target_dtype(config)

        source = None if config.let.target == "labels" else open_source(config.let.teacher)
        self.pairs = plan.pairs(config, source.info.num_layers if source else None)
        # Meshes are made by all ranks together, also by those that return below.
        teacher_dims = teacher_parallel_dims(dims, tensor_parallel=config.let.teacher.tensor_parallel)
        teacher_dims.build_mesh()
        self._share = TeacherShare(config, dims, device)

        # Numbers of the pairs of each part, block by block: the order in which a tap sums their cosines.
        by_block = sorted(range(len(self.pairs)), key=lambda i: self.pairs[i].student)
        self._pairs_of_taps = [
            [i for i in by_block if str(self.pairs[i].student) in part.layers] for part in trainer.model_parts
        ]
        self._refuse_blocks_on_no_stage()
        self._deepest_block = str(self.pairs[by_block[-1]].student)
        if config.let.target != "teacher":
            self._head = self._make_auxiliary_head()
        if source is None:
            self._attach(lambda i, part: self._head_align(i, cross_entropy))
            return
        all_channels = _channels(source.info, plan.teacher_layers(self.pairs), config.let.teacher.final_norm)
        self._center = self._make_center(sum(c.stop - c.start for c in all_channels.values()), steps_taken)
        own_pairs = [self.pairs[i] for indices in self._pairs_of_taps for i in indices]
        if not own_pairs:
            return
        layers = plan.teacher_layers(own_pairs)
        self._provider = make_provider(
            source,
            config=config,
            student_tokenizer=trainer.tokenizer,
            device=device,
            parallel_dims=teacher_dims,
            layers=layers,
        )
        if config.let.control == "random_teacher":
            assert self._provider.teacher is not None
            randomise_weights(self._provider.teacher)
        elif config.let.control == "shuffled_targets":
            self._provider = ShuffledStates(self._provider, seed=torch.distributed.get_rank())
        if self._provider.make_extras is not None:
            self._extras = BatchExtras(trainer.dataloader, self._provider.make_extras)
        channels = _channels(source.info, layers, config.let.teacher.final_norm)
        if self._center is not None:
            own = [all_channels[layer] for layer in layers]
            self._center_channels_E = torch.cat([torch.arange(c.start, c.stop, device=device) for c in own])
        if config.let.target == "logits":
            assert isinstance(source, TeacherSource) and self._provider.teacher is not None
            head = TeacherHead(source, self._provider.teacher, dtype=plan.teacher_dtype(config), device=device)
            loss = distillation_from(head, temperature=config.let.temperature)
            self._attach(lambda i, part: self._head_align(i, loss))
        else:
            self._attach(lambda i, part: self._align(i, part, channels[self.pairs[i].teacher], steps_taken))

    def start_step(self, weight: float, *, measures: bool = False) -> None:
        """Before the first microbatch of a step.

        Args:
            weight: The step's lambda.
            measures: Whether its metrics are to compare the alignment's gradient with that of the student's own loss.
        """
        self._measures = measures
        self._lambda = weight
        self._coverage.zero_()
        self._num_accumulations_left = self._trainer.gradient_accumulation_steps
        for tap in self.taps:
            tap.reset()
            tap.measured_block = self._deepest_block if measures else None
        if self._provider is not None:
            self._provider.start_step(self._trainer.step - 1)
        for learner in self._learners:
            learner.start_step(self._trainer.step - 1)

    @contextmanager
    def microbatches(self, global_valid_tokens: torch.Tensor) -> Iterator[None]:
        """Around one forward and backward pass, of one microbatch or of a pipeline's.

        Args:
            global_valid_tokens: Number of tokens of the whole step, over all ranks, that count in the loss; 0-dim.
        """
        self._valid_tokens = global_valid_tokens
        for tap in self.taps:
            tap.coefficient.fill_(self._lambda).div_(global_valid_tokens)
        yield
        self._num_accumulations_left -= 1
        if self._num_accumulations_left == 0:
            for learner in self._learners:
                learner.reduce()

    @property
    def teacher(self) -> Teacher | None:
        return None if self._provider is None else self._provider.teacher

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
        """The teacher's states of a microbatch, of this rank's part of the sequence, [B, S, E]; None without a teacher.

        If the labels are the target: these, [B, S].

        Args:
            input_dict: "input", token ids [B, L], and, for packed documents, "positions" [B, L]: whole sequences, as
                the data loader made them.
            labels_BL: Labels of the whole sequences. A token that does not count in the loss, or of which the teacher
                has no state, gets a state of zeros, whose cosine and gradient are 0: no mask has to travel.
            extras: What the data loader has made for LET beside them.
            student_masks: The attention masks that the student will run with, if there are any.
        """
        if self._trainer.config.let.target == "labels":
            return self._share.part(labels_BL)
        if self._provider is None:
            return None
        batch = {name: input_dict[name] for name in ("input", "positions") if name in input_dict} | dict(extras or {})
        with self._timer, record_function(TEACHER_RANGE):
            states_BLE, known_BL, num_tokens = self._provider.states(
                {name: self._share.rows(tensor) for name, tensor in batch.items()},
                self._share.masks(student_masks, len(labels_BL)),
            )
        self._tokens += num_tokens
        counts_BL = self._share.rows(labels_BL) != IGNORE_INDEX
        if known_BL is not None:
            self._coverage += torch.stack([(counts_BL & known_BL).sum(), counts_BL.sum()])
            counts_BL &= known_BL
        if self._center is not None:
            self._center.add(states_BLE, counts_BL, self._center_channels_E)
            states_BLE = states_BLE - self._center.mean_C[self._center_channels_E]  # fp32, before it is rounded
        states_BLE = states_BLE.to(self._target_dtype).masked_fill(~counts_BL[..., None], 0)
        with record_function(DELIVERY_RANGE):
            return self._share.deliver(states_BLE, len(labels_BL))

    def finish_step(self) -> None:
        """After the student's optimizer step. RuntimeError if the gradient of the alignment has reached no block."""
        for learner in self._learners:
            learner.finish_step()
        if self._center is not None:
            # All ranks of the job: each channel's layer may be on several pipeline stages, and on others not at all.
            torch.distributed.all_reduce(self._center.sums)
            self._center.finish_step()
        for tap in self.taps:
            for block, num_calls in tap.num_calls.items():
                if num_calls == 0:
                    raise RuntimeError(
                        f"LET: the tap was not reached in a training step: the hooks of its block, layers.{block}, did "
                        "not run. It has not been aligned, so the run is stopped"
                    )

    def metrics(self) -> dict[str, float]:
        """What the step has measured, over all ranks and valid tokens. Every rank must call it.

        Returns:
            let/cosine: mean cosine of the tokens that have a state of the teacher's; of several pairs, their mean, and
                each pair's own beside it.
            let/aligned_fraction: the share of the valid tokens that have one, unless all do by construction.
            let/grad_cosine, let/grad_ratio: cosine between the gradients of lambda * L_align and of the student's own
                loss with respect to the deepest aligned hidden state, and the ratio of their norms, if compared.
            let/teacher_tokens_per_second: of the teacher's forward pass alone, per rank that has one.
            let/auxiliary_loss: in place of cosine and speed, if the labels are the target: mean of the blocks' losses.
            let/distillation_loss: in place of the cosine, if the logits are.
        """
        cosines = self._valid_tokens.new_zeros(len(self.pairs), dtype=torch.float64)
        for tap, indices in zip(self.taps, self._pairs_of_taps, strict=bool(self.taps)):
            cosines[indices] = tap.metric_sums.double() / self._valid_tokens / self._num_replicas
        speed = cosines.new_tensor([self._tokens, self._timer.pop()])
        gradients = sum((tap.gradient_sums for tap in self.taps), start=cosines.new_zeros(3))
        totals = torch.cat([cosines, speed, gradients, self._coverage.double()])
        torch.distributed.all_reduce(totals)
        self._tokens = 0
        *means, tokens, seconds, dot, own, added, num_aligned, num_counted = totals.tolist()
        if num_counted:
            # The sums are over the tokens that have a state; they have been divided by the number of all that count.
            means = [mean * num_counted / max(num_aligned, 1) for mean in means]
        target = self._trainer.config.let.target
        metrics = {METRIC_OF_TARGET[target]: sum(means) / len(means)}
        if target != "labels":
            metrics["let/teacher_tokens_per_second"] = tokens / seconds
            if len(means) > 1:
                names = [f"let/cosine/{pair.student}-{pair.teacher}" for pair in self.pairs]
                metrics |= dict(zip(names, means, strict=True))
            if num_counted:
                metrics["let/aligned_fraction"] = num_aligned / num_counted
        if self._measures and own > 0 and added > 0:
            metrics |= {"let/grad_cosine": dot / math.sqrt(own * added), "let/grad_ratio": math.sqrt(added / own)}
        return metrics

    def remove(self) -> None:
        """Leaves no trace on the student, its trainer and its checkpoints."""
        for tap in self.taps:
            tap.remove()
        if self._head is not None:
            self._head.remove()
        for projector in self.projectors:
            projector.remove()
            if self._trainer.config.checkpoint.enable:
                del self._trainer.checkpointer.states[projector.name]
        if self._center is not None and self._trainer.config.checkpoint.enable:
            del self._trainer.checkpointer.states[CENTER]
        if self._extras is not None:
            self._extras.stop()
        self._provider, self.taps, self.projectors, self._head, self._center = None, [], [], None, None

    def _attach(self, make_align: Callable[[int, nn.Module], Align]) -> None:
        """Puts a tap on each part of the student; `make_align` makes the gradient of a pair, by its number, there."""
        for part, indices in zip(self._trainer.model_parts, self._pairs_of_taps, strict=True):
            aligns: dict[str, list[Align]] = {}
            for i in indices:
                aligns.setdefault(str(self.pairs[i].student), []).append(make_align(i, part))
            # The alignment stays on this rank: nothing in it is for torchtitan's check of what is sharded where.
            self.taps.append(AlignmentTap(part, aligns, self._trainer.device, context=spmd.no_typecheck))

    def _make_auxiliary_head(self) -> AuxiliaryHead:
        config, dims = self._trainer.config, self._trainer.parallel_dims
        return AuxiliaryHead(
            self._trainer.model_parts,
            config,
            pipeline=dims.get_mesh("pp").get_group() if dims.pp_enabled else None,
            sequence_parallel=config.parallelism.enable_sequence_parallel,
            device=self._trainer.device,
        )

    def _head_align(self, index: int, loss: LogitLoss) -> Align:
        assert self._head is not None
        return self._head.align(loss, self.pairs[index].weight)

    def _make_center(self, width: int, steps_taken: int) -> RunningMean | None:
        """The mean of the teacher's states, of all layers that any rank asks for; every rank has all of it."""
        config = self._trainer.config
        if not config.let.teacher.center:
            return None
        center = RunningMean(width, momentum=config.let.teacher.center_momentum, device=self._trainer.device)
        self._keep(CENTER, center, [_number(layer) for layer in plan.teacher_layers(self.pairs)], steps_taken)
        return center

    def _keep(self, name: str, stateful: Any, identity: list[int], steps_taken: int) -> None:
        """Restores a state if the run has resumed, and makes it a part of the run's checkpoints."""
        state = checkpoint.Identified(stateful, identity)
        if steps_taken > 0:
            checkpoint.restore(name, state, self._trainer.config, steps_taken)
        if self._trainer.config.checkpoint.enable:
            self._trainer.checkpointer.states[name] = state

    def _refuse_blocks_on_no_stage(self) -> None:
        owners = torch.zeros(len(self.pairs), device=self._trainer.device)
        owners[[i for indices in self._pairs_of_taps for i in indices]] = 1
        torch.distributed.all_reduce(owners)
        for pair, num_owners in zip(self.pairs, owners.tolist(), strict=True):
            if not num_owners:
                raise RuntimeError(f"LET: no pipeline stage holds layers.{pair.student}, a block that is to be aligned")

    def _align(self, index: int, part: nn.Module, channels: slice, steps_taken: int) -> Align:
        """The maths of pair `index`; makes its projector if it learns."""
        block = str(self.pairs[index].student)
        config, device = self._trainer.config, self._trainer.device
        make_match = plan.dimension_match(config.let)
        match = make_match(channels.stop - channels.start, config.model_spec.model.dim)
        cuts = config.parallelism.enable_sequence_parallel
        learned: LearnedProjector | None = None
        fitted: FittedProjector | None = None
        if any(parameter.requires_grad for parameter in match.parameters()):
            learned = LearnedProjector(match, part, block, config, index=index, sequence_parallel=cuts, device=device)
        match.to(device)
        if isinstance(match, FittedMatch):
            side = config.let.projector.side
            fitted = FittedProjector(match, part, block, index=index, side=side, sequence_parallel=cuts)
        if projector := learned or fitted:
            pair = self.pairs[index]
            self._keep(projector.name, projector, [pair.student, _number(pair.teacher)], steps_taken)
            self.projectors.append(projector)
        weight = self.pairs[index].weight
        pair_align = plan.alignment(config.let, match, config.compile, channels=channels, weight=weight)

        def align(student_BLD: torch.Tensor, teacher_BLE: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
            weights = learned.weights if learned else {}
            alignment, gradients = pair_align(student_BLD, teacher_BLE, coefficient, weights)
            if learned:
                learned.accumulate(gradients)
            if fitted:
                fitted.observe(student_BLD, teacher_BLE[..., channels])
            return alignment

        return align


def _number(layer: int | str) -> int:
    return layer if isinstance(layer, int) else -1


def _channels(teacher: TeacherInfo, layers: Sequence[int | str], final_norm: bool) -> dict[int | str, slice]:
    """Where each layer lies in the states that the teacher returns."""
    result, start = {}, 0
    for layer in layers:
        result[layer] = slice(start, start + teacher.width(layer, final_norm))
        start = result[layer].stop
    return result
