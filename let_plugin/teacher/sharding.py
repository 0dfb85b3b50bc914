"""Where the teacher's weights and its work lie, whatever the student's parallelism.

The teacher is never context- or pipeline-parallel, and tensor-parallel only where `let.teacher.tensor_parallel` asks
for it: its heads need not divide by the student's degrees, and a `transformers` model needs no plan. It is
data-parallel over all the ranks of a pipeline stage: each of them, the student's tensor- and context-parallel ones too,
holds a shard of its weights (FSDP2) and runs a share of its rows.

Shape legend: B batch, L sequence, E teacher width, S the part of the sequence that this rank's block output covers.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.profiler import record_function
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.alignment.running_mean import RunningMean
from let_plugin.config import LetConfig, plan
from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.runtime import upstream
from let_plugin.teacher.base import StateProvider

# Plain tensors and FSDP2: the teacher needs no annotations, and runs outside the student's SPMD context.
SPMD_BACKEND = "partial_dtensor"

# Names of ranges in a profile.
TEACHER_RANGE, DELIVERY_RANGE = "let: teacher", "let: delivery"


def teacher_parallel_dims(student: ParallelDims, *, tensor_parallel: bool = False) -> ParallelDims:
    """The teacher's device meshes: replicated where the student is, else sharded over a whole pipeline stage.

    With `tensor_parallel` it is cut over the student's tensor-parallel ranks, and sharded over the others. Every rank
    of the job must call it, also those that will not hold a teacher: meshes are made together.
    """
    tp = student.tp if tensor_parallel else 1
    return ParallelDims(
        dp_replicate=student.pp * student.dp_replicate,
        dp_shard=student.dp_shard * student.cp * student.tp // tp,
        cp=1,
        tp=tp,
        pp=1,
        ep=1,
        world_size=student.world_size,
        spmd_backend=SPMD_BACKEND,
    )


def groups(parallel_dims: ParallelDims) -> list[dist.ProcessGroup]:
    """What the ranks that share a teacher are connected by: first within tensor parallelism, then over the shards."""
    axes = (("tp", parallel_dims.tp_enabled), ("fsdp", parallel_dims.dp_shard_enabled))
    return [parallel_dims.get_mesh(axis).get_group() for axis, enabled in axes if enabled]


def raise_together(problems: list[Problem], parallel_dims: ParallelDims) -> None:
    """ConfigError with the problems of all the ranks of the teacher's device meshes, on each of them."""
    for group in groups(parallel_dims):
        found: list[list[Problem]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(found, problems, group=group)
        problems = list(dict.fromkeys(problem for of_rank in found for problem in of_rank))
    raise_if_any(problems)


def read_once(
    read: Callable[[], dict[str, torch.Tensor]], parallel_dims: ParallelDims
) -> tuple[dict[str, torch.Tensor], dict[str, torch.dtype]]:
    """Calls `read` on the first of the ranks that a teacher is sharded over; each replica has its own first rank.

    Returns the tensors, none on the ranks that have not read, and on all the data type of each. ConfigError on all of
    them if `read` raises one. `parallel_dims` are the teacher's device meshes.
    """
    tensors: dict[str, torch.Tensor] = {}
    problems = []
    if all(group.rank() == 0 for group in groups(parallel_dims)):
        try:
            tensors = read()
        except ConfigError as error:
            problems = list(error.problems)
    raise_together(problems, parallel_dims)
    described: list[Any] = [{name: tensor.dtype for name, tensor in tensors.items()}]
    for group in groups(parallel_dims):
        dist.broadcast_object_list(described, group=group, group_src=0)
    return tensors, described[0]


@torch.no_grad()
def hand_out(
    tensors: dict[str, torch.Tensor], targets: Iterable[tuple[str, torch.Tensor]], parallel_dims: ParallelDims
) -> None:
    """Copies the tensors that `read_once` has read into `targets`, sharded or whole, one at a time.

    (`set_model_state_dict(broadcast_from_rank0=True)` sends over the group of all ranks, and those of a pipeline stage
    without a teacher do not take part.)
    """
    for name, target in targets:
        if name in tensors:
            whole = tensors.pop(name).to(target.device, target.dtype).contiguous()
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if isinstance(target, DTensor):
            axes = target.device_mesh.mesh_dim_names or ()
            kept = [i for i, axis in enumerate(axes) if axis != "dp_replicate"]
            mesh = target.device_mesh[tuple(axes[i] for i in kept)]
            shard = distribute_tensor(whole, mesh, [target.placements[i] for i in kept])
            target.to_local().copy_(shard.to_local())
        else:
            for group in groups(parallel_dims):
                dist.broadcast(whole, group=group, group_src=0)
            target.copy_(whole)


def sequence_shards(config: Trainer.Config, student: ParallelDims) -> int:
    """Into how many parts the sequence of a block's output is cut."""
    return student.cp * (student.tp if config.parallelism.enable_sequence_parallel else 1)


def num_peers(config: Trainer.Config, student: ParallelDims) -> int:
    """How many ranks see the same rows and may split them for the teacher: those that do not cut it among them."""
    return student.cp * (1 if config.let.teacher.tensor_parallel else student.tp)


class TeacherShare:
    """Which rows of a microbatch this rank runs the teacher on, and how the states get to the ranks that need them.

    The tensor- and context-parallel ranks of one data-parallel rank ("peers") see the same rows. Each runs the teacher
    on whole sequences of its share of the rows; one all-to-all then gives each its part of the sequence, of all rows.
    If the rows do not divide evenly, each peer runs all of them and cuts its part out. The ranks of a teacher that is
    itself tensor-parallel run the same rows together, and are no peers.

    `student` are the student's device meshes. Every rank of the job must make one: its mesh is made together.
    `of_head`: what is delivered is for the student's head, whose input sequence parallelism does not cut; `block_part`
    cuts that of the blocks out of it.
    """

    def __init__(self, config: Trainer.Config, student: ParallelDims, device: torch.device, *, of_head: bool) -> None:
        cuts_blocks = student.tp_enabled and config.parallelism.enable_sequence_parallel
        # The tensor-parallel mesh that has yet to cut what is delivered.
        self._block_mesh = student.get_mesh("tp") if of_head and cuts_blocks else None
        self._cuts_masks = student.cp_enabled
        self._num_peers = num_peers(config, student)
        self._mesh: DeviceMesh | None = None
        self._part_S = _sequence_part(config, student, device, by_tp=cuts_blocks and not of_head)
        if self._num_peers == 1:
            return
        # The two innermost axes of torchtitan's meshes are context and tensor parallelism.
        same_rows = student.cp * student.tp
        shape = (student.world_size // same_rows, self._num_peers, same_rows // self._num_peers)
        names = ("let_data", "let_peers", "let_teacher_tp")
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)["let_peers"]
        if self._part_S is not None:
            self._all_parts = self._part_S.new_empty(self._num_peers * len(self._part_S))
            dist.all_gather_into_tensor(self._all_parts, self._part_S, group=self._mesh.get_group())

    def divides(self, num_rows: int) -> bool:
        """Whether the peers split so many rows among them; if not, each runs all of them."""
        return self._num_peers > 1 and num_rows % self._num_peers == 0

    def rows(self, tensor_BL: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a microbatch that all its peers see."""
        return tensor_BL[self._rows(len(tensor_BL))]

    def masks(self, student_masks: Any, num_rows: int) -> Any:
        """The same of the student's attention masks; None if they are of a kind that cannot be cut, or cut already."""
        if self._cuts_masks:  # by context parallelism
            return None
        return masks_of(student_masks, self._rows(num_rows)) if self.divides(num_rows) else student_masks

    def _rows(self, num_rows: int) -> slice:
        if self._mesh is None or not self.divides(num_rows):
            return slice(num_rows)
        num = num_rows // self._num_peers
        return slice(num * self._mesh.get_local_rank(), num * (self._mesh.get_local_rank() + 1))

    def part(self, tensor_BL: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sequence: [B, L, ...] to [B, S, ...]."""
        return tensor_BL if self._part_S is None else tensor_BL.index_select(1, self._part_S)

    def block_part(self, delivered_BSE: torch.Tensor) -> torch.Tensor:
        """Of what has been delivered, the part of the sequence that this rank's block output covers."""
        if self._block_mesh is None:
            return delivered_BSE
        return delivered_BSE.chunk(self._block_mesh.size(), dim=1)[self._block_mesh.get_local_rank()]

    def deliver(self, states_BLE: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The states of this rank's part of the sequence, [num_rows, S, E], from those of its rows, [rows, L, E]."""
        if not self.divides(num_rows):
            return self.part(states_BLE)
        assert self._mesh is not None
        rows, _, width = states_BLE.shape
        if self._part_S is None:
            gathered_BLE = states_BLE.new_empty((num_rows, *states_BLE.shape[1:]))
            dist.all_gather_into_tensor(gathered_BLE, states_BLE.contiguous(), group=self._mesh.get_group())
            return gathered_BLE
        # [rows, peers * S, E] -> [peers, rows, S, E]: what each peer is to get lies together.
        parts = states_BLE.index_select(1, self._all_parts).view(rows, self._num_peers, -1, width)
        sent = parts.transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._mesh.get_group())
        return received.view(num_rows, -1, width)


@dataclass(eq=False)
class TargetProvider:
    """Makes the target of each microbatch: the teacher's states of this rank's part of the sequence."""

    states: StateProvider  # makes the states of this rank's rows
    share: TeacherShare  # which rows these are
    _: KW_ONLY
    center: RunningMean | None  # is subtracted from the states
    center_channels_E: torch.Tensor  # which channels of the mean the states have
    timer: AbstractContextManager[Any]  # entered around the teacher's forward pass
    let: LetConfig  # says which rows of a microbatch have a target
    num_tokens: int = 0  # tokens that the teacher has run on since this was last set to 0

    def __post_init__(self) -> None:
        # Of this rank's tokens that count in the loss, since `start_step`: how many have a state, and how many there
        # are. Zeros if all tokens have a state by construction.
        self.coverage = torch.zeros(2, dtype=torch.int64, device=self.center_channels_E.device)

    def start_step(self, step: int) -> None:
        """Before the first microbatch of step `step` (0-based)."""
        self._step = step
        self.coverage.zero_()
        self.states.start_step(step)

    def target(
        self, batch: Mapping[str, torch.Tensor], labels_BL: torch.Tensor, student_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states of a microbatch, [B, S, E], in the teacher's dtype, and the indices of these rows; None: of all.

        Zeros for a token that does not count: if its label does not, or if the teacher has no state of it. A state of
        zeros has a cosine and a gradient of 0, so no mask has to travel. Arguments as in StateProvider.states, but with
        all rows, and the labels of the whole sequences.
        """
        if self.let.teacher.rows == 1:
            return self._target(batch, labels_BL, student_masks), None
        rows = plan.teacher_rows(self.let, self._step, len(labels_BL))
        masks = masks_of(student_masks, rows)
        states_BSE = self._target({name: tensor[rows] for name, tensor in batch.items()}, labels_BL[rows], masks)
        return states_BSE, torch.arange(rows.start, rows.stop, device=states_BSE.device)

    def _target(self, batch: Mapping[str, torch.Tensor], labels_BL: torch.Tensor, student_masks: Any) -> torch.Tensor:
        share, num_rows = self.share, len(labels_BL)
        with self.timer, record_function(TEACHER_RANGE):
            states_BLE, known_BL, num_tokens = self.states.states(
                {name: share.rows(tensor) for name, tensor in batch.items()}, share.masks(student_masks, num_rows)
            )
        self.num_tokens += num_tokens
        dtype = states_BLE.dtype
        counts_BL = share.rows(labels_BL) != IGNORE_INDEX
        if known_BL is not None:
            self.coverage += torch.stack([(counts_BL & known_BL).sum(), counts_BL.sum()])
            counts_BL &= known_BL
        if self.center is not None:
            channels_E = self.center_channels_E[: states_BLE.shape[-1]]  # the last layers' when a term has ended
            self.center.add(states_BLE, counts_BL, channels_E)
            states_BLE = states_BLE - self.center.mean_C[channels_E]  # fp32, before it is rounded
        states_BLE = states_BLE.to(dtype).masked_fill(~counts_BL[..., None], 0)
        with record_function(DELIVERY_RANGE):
            return share.deliver(states_BLE, num_rows)


def masks_of(masks: Any, rows: slice) -> Any:
    """The attention masks of some rows of those of all; None for a kind that cannot be cut."""
    masks = masks.to_local() if isinstance(masks, DTensor) else masks
    if not isinstance(masks, torch.Tensor | BlockMask):
        return None
    found: Any = masks if masks.shape[0] == 1 else masks[rows]  # one: for all rows
    if isinstance(masks, BlockMask) and found is not masks:
        of_all, first = masks.mask_mod, torch.full((), rows.start, device=masks.kv_indices.device)
        found.mask_mod = lambda b, h, q, kv: of_all(b + first, h, q, kv)
    return found


def _sequence_part(
    config: Trainer.Config, student: ParallelDims, device: torch.device, *, by_tp: bool
) -> torch.Tensor | None:
    """Indices into L of this rank's block output, or its head's input, cut as torchtitan cuts those; None: all."""
    if not student.cp_enabled and not by_tp:
        return None
    index_L = torch.arange(config.training.seq_len, device=device)
    if student.cp_enabled:
        load_balancer = config.parallelism.context_parallel_load_balancer
        index_L = upstream.context_parallel_part(index_L, student.get_mesh("cp"), load_balancer)
    if by_tp:
        index_L = index_L.chunk(student.tp)[student.get_mesh("tp").get_local_rank()]
    return index_L.contiguous()
