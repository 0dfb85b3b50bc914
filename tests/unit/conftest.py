import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port


@pytest.fixture(scope="module")
def parallel_dims():
    """torchtitan's meshes of one process, with the process group (gloo) that they stand on."""
    from torchtitan.distributed import ParallelDims

    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{get_free_port()}", rank=0, world_size=1)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    dims.build_mesh()
    yield dims
    torch.distributed.destroy_process_group()
