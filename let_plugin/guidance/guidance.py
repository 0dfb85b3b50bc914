"""Everything that exists only while a term is active: created at the first step that needs it, released at the last.

The trainer calls `start_step`, then for each microbatch `targets`, then `finish_step`. Under pipeline parallelism only
the ranks whose stage meets the teacher's states have a teacher; the others take part in what is collective.

Shape legend: B batch, L sequence, E teacher width, S the part of the sequence that this rank's block output covers.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.trainer import Trainer

from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.alignment.running_mean import RunningMean
from let_plugin.config import plan
from let_plugin.guidance.controls import ShuffledStates, randomize_weights
from let_plugin.guidance.distillation import Distillation
from let_plugin.guidance.metrics import DeviceTimer
from let_plugin.guidance.signals import Signal
from let_plugin.guidance.stopping import TermProgress
from let_plugin.runtime import checkpoint
from let_plugin.runtime.batch_extras import BatchExtras
from let_plugin.teacher.base import StateProvider, Teacher, TeacherInfo, TeacherSource, num_blocks_to
from let_plugin.teacher.open import make_provider, open_source, open_teacher
from let_plugin.teacher.sharding import TargetProvider, TeacherShare, teacher_parallel_dims
from let_plugin.teacher.stored.features import Features

TARGET_RANGE = "let: target"  # in a profile; the teacher and the tap have their own
CENTER = "let_center"  # the running mean's state in a checkpoint
_Batch = tuple[dict[str, torch.Tensor], torch.Tensor]  # inputs, labels


class Guidance:
    """The teacher, and the terms that are active. Every rank of the job makes one, at the same step.

    `progress` is that of each term that has not ended; `steps_taken` is more than 0 if the run has resumed.

    Attributes:
        signals: The terms, in order.
    """

    def __init__(self, trainer: Trainer, progress: Sequence[TermProgress], steps_taken: int) -> None:
        config, dims, device = trainer.config, trainer.parallel_dims, trainer.device
        self._trainer = trainer
        self._steps_taken = steps_taken
        self._provider: TargetProvider | None = None
        self._layers: list[int | str] = []  # that the teacher of this rank returns
        self._extras: BatchExtras | None = None
        self._center: RunningMean | None = None
        self._num_accumulations_left = 0
        self._valid_tokens = torch.ones((), device=device)  # of the step, of the rows that have a state
        self._num_targets: torch.Tensor | None = None  # of them, this data-parallel rank's, until they are reduced
        self._timer = DeviceTimer(device)

        self._source = source = open_source(config.let.teacher) if any(p.term.has_teacher for p in progress) else None
        # All ranks of the job communicate here, in this order. Only then a rank that meets no state may skip the
        # teacher, whose building is collective among the ranks of one pipeline stage alone.
        self._teacher_dims = teacher_parallel_dims(dims, tensor_parallel=config.let.teacher.tensor_parallel)
        self._teacher_dims.build_mesh()
        of_head = any(p.term.config.signal == "logits" for p in progress)
        self._share = TeacherShare(config, dims, device, of_head=of_head)
        # The numbers of the pairs, and the places of the layers, are the same when some terms have ended.
        depth = source.info.num_layers if source else None
        pairs = [
            [] if term.has_teacher and depth is None else plan.pairs(config, term, depth)
            for term in plan.terms(config.let)
        ]
        firsts = [sum(map(len, pairs[:i])) for i in range(len(pairs))]
        self.signals = [Signal(trainer, p, pairs[p.term.index], firsts[p.term.index], self._keep) for p in progress]
        if source is not None:
            of_teacher = [pair for term in plan.teacher_terms(config.let) for pair in pairs[term.index]]
            self._center = self._make_center(source.info, of_teacher)
            self._layers = plan.teacher_layers(self._own_pairs())
            if self._layers:
                self._add_teacher(source, of_teacher)

    def _own_pairs(self) -> list[LayerPair]:
        """Of this rank, those that the teacher is needed for."""
        return [pair for signal in self.signals if signal.term.has_teacher for pair in signal.own_pairs]

    def _add_teacher(self, source: TeacherSource | Features, pairs: Sequence[LayerPair]) -> None:
        config, device = self._trainer.config, self._trainer.device
        states, channels = self._make_states(source), self._channels(source.info, self._layers)
        places = self._channels(source.info, plan.teacher_layers(pairs))
        channels_E = torch.cat([torch.arange(places[i].start, places[i].stop, device=device) for i in channels])
        self._provider = TargetProvider(
            states, self._share, center=self._center, center_channels_E=channels_E, timer=self._timer, let=config.let
        )
        if states.make_extras is not None:
            self._extras = BatchExtras(self._trainer.dataloader, states.make_extras)
        for signal in (signal for signal in self.signals if signal.term.has_teacher and signal.own_pairs):
            if signal.term.config.signal == "states":
                signal.attach_states(channels)
            else:
                teacher = source if isinstance(source, TeacherSource) else open_teacher(config.let.teacher)
                arguments = self._trainer, signal.term, teacher, self._teacher_dims
                signal.attach_logits(Distillation(*arguments, channels[source.info.num_layers - 1]))

    def start_step(self, *, measures: bool = False) -> None:
        """Before a step's first microbatch; whether its metrics compare the gradients."""
        self._num_accumulations_left = self._trainer.gradient_accumulation_steps
        for signal in self.signals:
            signal.start_step(measures=measures)
        if self._provider is not None:
            self._provider.start_step(self._trainer.step - 1)

    def counted(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The batches of a step, of which the tokens of the rows that have a target are counted on the way."""
        let = self._trainer.config.let
        self._num_targets = None if let.teacher.rows == 1 else torch.zeros((), dtype=torch.int64)
        for input_dict, labels_BL in batches:
            if self._num_targets is not None:
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
        for signal in self.signals:
            signal.start_microbatch(self._valid_tokens if signal.term.has_teacher else global_valid_tokens)
        yield
        self._num_accumulations_left -= 1
        if self._num_accumulations_left == 0:
            for signal in self.signals:
                for learner in signal.learners:
                    learner.reduce()

    @property
    def teacher(self) -> Teacher | None:
        """None on the ranks whose pipeline stages meet no state, and if nothing runs one."""
        return None if self._provider is None else self._provider.states.teacher

    @torch.no_grad()
    @record_function(TARGET_RANGE)
    def targets(
        self,
        input_dict: Mapping[str, torch.Tensor],
        labels_BL: torch.Tensor,
        extras: Mapping[str, torch.Tensor] | None = None,
        student_masks: Any = None,
    ) -> dict[str, torch.Tensor]:
        """The keyword arguments of the model that carry a microbatch's targets to the taps of this rank.

        Those of blocks are the teacher's states, [B, S, E], as TargetProvider.target makes them, or the labels, [B, S];
        that of the head has the states of its input, [B, L, E], cut by context parallelism alone. If the teacher has
        not run on all rows, a second argument says on which. `input_dict` has "input", token ids, and, for packed
        documents, "positions", of whole sequences, [B, L]; `extras` is what the data loader has added for LET,
        `student_masks` the attention masks that the student will run with.
        """
        states, rows = None, None
        if self._provider is not None:
            batch = {name: input_dict[name] for name in ("input", "positions") if name in input_dict}
            states, rows = self._provider.target({**batch, **(extras or {})}, labels_BL, student_masks)
        targets = {}
        for signal in filter(lambda signal: signal.taps, self.signals):
            target = states if signal.term.has_teacher else self._share.part(labels_BL)
            assert target is not None
            tap = signal.taps[0]
            if signal.term.has_teacher and rows is not None:
                targets[tap.rows_kwarg] = rows
            targets[tap.kwarg] = target if signal.term.config.signal == "logits" else self._share.block_part(target)
        return targets

    def finish_step(self) -> None:
        """After the student's optimizer step. RuntimeError if a term's gradient has reached no part of the student."""
        if self._center is not None:
            # A channel's layer may be on several pipeline stages, and on others not at all.
            torch.distributed.all_reduce(self._center.sums)
            self._center.finish_step()
        for signal in self.signals:
            signal.finish_step()

    def metrics(self) -> dict[str, float]:
        """What the step has measured, over all ranks and valid tokens, by the names of README's table.

        Every rank must call it. The gradients of grad_cosine and grad_ratio are those with respect to the term's
        deepest block, or the logits; the student's own includes what arrives there of other terms.
        """
        common = torch.zeros(4, dtype=torch.float64, device=self._trainer.device)
        common[1] = sum(self._timer.pop())
        if self._provider is not None:
            common[0], common[2:] = self._provider.num_tokens, self._provider.coverage
            self._provider.num_tokens = 0
        parts = [common, *(signal.sums() for signal in self.signals)]
        totals = torch.cat(parts)
        torch.distributed.all_reduce(totals)
        (tokens, seconds, num_aligned, num_counted), *sums = (
            part.tolist() for part in totals.split([len(part) for part in parts])
        )
        # Sums over the tokens that have a state are divided by the number of all that count.
        coverage = max(num_aligned, 1) / num_counted if num_counted else 1.0
        metrics: dict[str, float] = {}
        for signal, of_signal in zip(self.signals, sums, strict=True):
            metrics |= signal.metrics(of_signal, coverage)
        if any(signal.term.has_teacher for signal in self.signals):
            metrics["let/teacher_tokens_per_second"] = tokens / seconds if seconds > 0 else 0.0
        if num_counted:
            metrics["let/aligned_fraction"] = num_aligned / num_counted
        return metrics

    def end(self, signals: Sequence[Signal] | None = None) -> None:
        """Lets go of terms, and of what of the teacher the others do not need. None: of all; it leaves no trace."""
        ended = self.signals if signals is None else signals
        for signal in ended:
            signal.remove()
            self._forget(signal.kept)
        self.signals = [signal for signal in self.signals if signal not in ended]
        if not self.signals and self._center is not None:
            self._forget([CENTER])
        layers, provider = plan.teacher_layers(self._own_pairs()), self._provider
        if provider is None or not layers:
            if self._extras is not None:
                self._extras.stop()
            self._provider, self._extras = None, None
        elif provider.states.teacher is not None and num_blocks_to(layers) < num_blocks_to(self._layers):
            # The deepest layers come last: those that stay are where they were.
            self._layers = [layer for layer in self._layers if num_blocks_to([layer]) <= num_blocks_to(layers)]
            del provider.states
            gc.collect()  # torchtitan has switched off the automatic collection; FSDP's modules are in cycles
            assert self._source is not None
            provider.states = self._make_states(self._source)

    def _make_states(self, source: TeacherSource | Features) -> StateProvider:
        trainer, dims = self._trainer, self._trainer.parallel_dims
        where = trainer.device, self._teacher_dims, self._layers
        states = make_provider(source, trainer.config, *where, student_tokenizer=trainer.tokenizer)
        control = trainer.config.let.control
        if control == "random_teacher":
            assert states.teacher is not None
            randomize_weights(states.teacher)
        elif control == "shuffled_targets":
            return ShuffledStates(states, seed=dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0)
        return states

    def _make_center(self, teacher: TeacherInfo, pairs: Sequence[LayerPair]) -> RunningMean | None:
        """The mean of the teacher's states, of all layers that any rank asks for; every rank has all of it."""
        settings = self._trainer.config.let.teacher
        if not settings.center:
            return None
        layers = plan.teacher_layers(pairs)
        width = max(channels.stop for channels in self._channels(teacher, layers).values())
        center = RunningMean(width, momentum=settings.center_momentum, device=self._trainer.device)
        self._keep(CENTER, center, [layer if isinstance(layer, int) else -1 for layer in layers])
        return center

    def _keep(self, name: str, stateful: Any, identity: Sequence[int]) -> None:
        """Restores a state if the run has resumed, and makes it a part of the run's checkpoints."""
        state = checkpoint.Identified(stateful, identity)
        if self._steps_taken > 0:
            checkpoint.restore(name, state, self._trainer.config, self._steps_taken)
        if self._trainer.config.checkpoint.enable:
            self._trainer.checkpointer.states[name] = state

    def _forget(self, names: Sequence[str]) -> None:
        if self._trainer.config.checkpoint.enable:
            for name in names:
                del self._trainer.checkpointer.states[name]

    def _channels(self, teacher: TeacherInfo, layers: Sequence[int | str]) -> dict[int | str, slice]:
        """Where each layer lies in the states that the teacher returns."""
        result, start = {}, 0
        for layer in layers:
            stop = start + teacher.width(layer, self._trainer.config.let.teacher.final_norm)
            result[layer], start = slice(start, stop), stop
        return result
