"""torchtitan's dry run (`comm.mode = "fake_backend"`): one process that takes itself for one rank of many.

Its collectives move no data, so that what is computed means nothing; but the meshes, the sharding and every layer's
forward and backward pass, the teacher's included, are those of the real job. The environment variable NGPU says how
many ranks there are to be, RANK which one this is.
"""

import os

from torchtitan.config import CommConfig, ParallelismConfig

from let_plugin.config.errors import ConfigError, Problem

_FAKE_MODES = ("fake_backend", "local_tensor")


def world_size(comm: CommConfig, parallelism: ParallelismConfig) -> int:
    """The number of ranks of the job, real or not. ConfigError for a dry run that cannot be."""
    if comm.mode not in _FAKE_MODES:
        return int(os.environ["WORLD_SIZE"])
    if comm.mode == "local_tensor":
        # torchtitan's own entry point trains nothing in this mode: FSDP2 cannot gather a LocalTensor's parameters.
        message = 'torchtitan 0.3 builds, but cannot train, in this mode; "fake_backend" is the dry run'
        raise ConfigError(Problem("comm.mode", message, comm.mode))
    if parallelism.pipeline_parallel_degree > 1:
        message = (
            "a pipeline's stages tell each other their shapes, which torch does not do in a dry run; set "
            "parallelism.pipeline_parallel_degree = 1"
        )
        raise ConfigError(Problem("comm.mode", message, comm.mode))
    num_ranks, rank = os.environ.get("NGPU", ""), os.environ.get("RANK", "0")
    if not num_ranks.isdecimal() or int(num_ranks) < 1:
        message = "a dry run needs the number of ranks in the environment variable NGPU, as in NGPU=32 let-train ..."
        raise ConfigError(Problem("comm.mode", message, comm.mode))
    if not rank.isdecimal() or int(rank) >= int(num_ranks):
        message = f"the environment variable RANK is {rank}; of NGPU={num_ranks} ranks it must be one, from 0"
        raise ConfigError(Problem("comm.mode", message, comm.mode))
    return int(num_ranks)
