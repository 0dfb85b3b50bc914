"""What is there only while the teacher guides the student: made at the first step that needs it, gone at the stop.

The trainer calls `start_step`, then for each microbatch `target`, then `finish_step`. Under pipeline parallelism only
the ranks whose stage holds the aligned block have a teacher; the others take part in what is collective.

Shape legend: B batch, L sequence, E teacher width, S the part of the sequence that this rank's block output covers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import spmd_types as spmd
import torch
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer

from let_plugin import plan
from let_plugin.alignment.losses import Alignment
from let_plugin.alignment.tap import Align, AlignmentTap
from let_plugin.learned import PROJECTOR, LearnedProjector
from let_plugin.metrics import DeviceTimer
from let_plugin.teacher.base import Teacher
from let_plugin.teacher.sharding import TeacherShare, sequence_shards, teacher_parallel_dims
from let_plugin.teacher.sources import open_teacher


class Guidance:
    """The teacher, the tap and, if it learns, the projector. Every rank of the job makes one, at the same step.

    Args:
        trainer: The student's trainer; its `let` table says what to build.
        steps_taken: Optimizer steps taken so far; more than 0 if the run has resumed.

    Attributes:
        teacher: None on the ranks whose pipeline stages do not hold the aligned block.
        tap: Likewise.
        projector: None as well if the dimension match has nothing to learn.
    """

    def __init__(self, trainer: Trainer, steps_taken: int) -> None:
        config, dims, device = trainer.config, trainer.parallel_dims, trainer.device
        self.teacher: Teacher | None = None
        self.tap: AlignmentTap | None = None
        self.projector: LearnedProjector | None = None
        self._trainer = trainer
        self._num_accumulations_left = 0
        self._lambda = 0.0
        self._valid_tokens = torch.ones((), device=device)
        self._timer = DeviceTimer(device)
        self._tokens = 0
        # Ranks that align the same part of the same rows: tensor-parallel ones without sequence parallelism.
        self._num_replicas = dims.cp * dims.tp // sequence_shards(config, dims)
        self._target_dtype = plan.target_dtype(config)

        source = open_teacher(config.let.teacher)
        pair = plan.layer_pair(config, source.info)
        # Meshes are made by all ranks together, also by those that return below.
        teacher_dims = teacher_parallel_dims(dims)
        teacher_dims.build_mesh()
        self._share = TeacherShare(config, dims, device)

        block = str(pair.student)
        part = next((part for part in trainer.model_parts if block in part.layers), None)
        owners = torch.tensor(float(part is not None), device=device)
        torch.distributed.all_reduce(owners)
        if not owners:
            raise RuntimeError(f"LET: no pipeline stage holds layers.{block}, the block that is to be aligned")
        if part is None:
            return
        self.teacher = source.build(
            dtype=plan.teacher_dtype(config), device=device, config=config, parallel_dims=teacher_dims
        )
        match = plan.dimension_match(config.let)(source.info.hidden_size, config.model_spec.model.dim)
        if any(True for _ in match.parameters()):
            self.projector = LearnedProjector(
                match,
                part,
                block,
                config,
                sequence_parallel=config.parallelism.enable_sequence_parallel,
                device=device,
            )
            if steps_taken > 0:
                self.projector.restore(config, steps_taken)
            if config.checkpoint.enable:
                trainer.checkpointer.states[PROJECTOR] = self.projector
            align = _align_and_learn(self.projector, match, config)
        else:
            align = plan.alignment(config.let, match.to(device), config.compile)
        others = [other for other in trainer.model_parts if other is not part]
        # The alignment stays on this rank: nothing in it is for torchtitan's check of what is sharded where.
        self.tap = AlignmentTap(part, block, align, device, other_models=others, context=spmd.no_typecheck)

    def start_step(self, weight: float) -> None:
        """Before the first microbatch of a step, whose lambda is `weight`."""
        self._lambda = weight
        self._num_accumulations_left = self._trainer.gradient_accumulation_steps
        if self.tap is not None:
            self.tap.reset()
        if self.projector is not None:
            self.projector.start_step()

    @contextmanager
    def microbatches(self, global_valid_tokens: torch.Tensor) -> Iterator[None]:
        """Around one forward and backward pass, of one microbatch or of a pipeline's.

        Args:
            global_valid_tokens: Number of tokens of the whole step, over all ranks, that count in the loss; 0-dim.
        """
        self._valid_tokens = global_valid_tokens
        if self.tap is not None:
            self.tap.coefficient.fill_(self._lambda).div_(global_valid_tokens)
        yield
        self._num_accumulations_left -= 1
        if self.projector is not None and self._num_accumulations_left == 0:
            self.projector.reduce_gradients()

    @torch.no_grad()
    def target(self, input_dict: dict[str, torch.Tensor], labels_BL: torch.Tensor) -> torch.Tensor | None:
        """The teacher's states of a microbatch, of this rank's part of the sequence, [B, S, E]; None without a teacher.

        Args:
            input_dict: "input", token ids [B, L], and, for packed documents, "positions" [B, L]: whole sequences, as
                the data loader made them.
            labels_BL: Labels of the whole sequences. A token that does not count in the loss gets a state of zeros,
                whose cosine and gradient are 0: no mask has to travel.
        """
        if self.teacher is None:
            return None
        tokens_BL, positions_BL = input_dict["input"], input_dict.get("positions")
        rows_BL = self._share.rows(tokens_BL)
        with self._timer:
            states_BLE = self.teacher(rows_BL, None if positions_BL is None else self._share.rows(positions_BL))
        self._tokens += rows_BL.numel()
        ignored_BL1 = (self._share.rows(labels_BL) == IGNORE_INDEX).unsqueeze(-1)
        states_BLE = states_BLE.to(self._target_dtype).masked_fill(ignored_BL1, 0)
        return self._share.deliver(states_BLE, len(tokens_BL))

    def finish_step(self) -> None:
        """After the student's optimizer step. RuntimeError if the gradient of the alignment has reached no block."""
        if self.projector is not None:
            self.projector.finish_step()
        if self.tap is not None and self.tap.num_calls == 0:
            raise RuntimeError(
                "LET: the tap was not reached in a training step: the hooks of its block did not run. Nothing has been "
                "aligned, so the run is stopped"
            )

    def metrics(self) -> dict[str, float]:
        """The mean cosine over the step's valid tokens, and the teacher's speed; over all ranks, each must call it."""
        cosine = self._valid_tokens.new_zeros((), dtype=torch.float64)
        if self.tap is not None:
            cosine = self.tap.cosine_sum.double() / self._valid_tokens / self._num_replicas
        totals = torch.stack([cosine, cosine.new_tensor(self._tokens), cosine.new_tensor(self._timer.pop())])
        torch.distributed.all_reduce(totals)
        self._tokens = 0
        cosine_mean, tokens, seconds = totals.tolist()
        return {"let/cosine": cosine_mean, "let/teacher_tokens_per_second": tokens / seconds}

    def remove(self) -> None:
        """Leaves no trace on the student, its trainer and its checkpoints."""
        if self.tap is not None:
            self.tap.remove()
        if self.projector is not None:
            self.projector.remove()
            if self._trainer.config.checkpoint.enable:
                del self._trainer.checkpointer.states[PROJECTOR]
        self.teacher = self.tap = self.projector = None


def _align_and_learn(projector: LearnedProjector, match: nn.Module, config: Trainer.Config) -> Align:
    align = plan.learned_alignment(config.let, match, config.compile)

    def align_and_accumulate(
        student_BLD: torch.Tensor, teacher_BLE: torch.Tensor, coefficient: torch.Tensor
    ) -> Alignment:
        alignment, gradients = align(student_BLD, teacher_BLE, coefficient, projector.weights)
        projector.accumulate(gradients)
        return alignment

    return align_and_accumulate
