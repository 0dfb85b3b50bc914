"""One of the ranks that share a teacher reads it, and hands the others their shards."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.distributed import ParallelDims

from let_plugin.config.errors import ConfigError
from let_plugin.teacher.sharding import groups, raise_together


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
