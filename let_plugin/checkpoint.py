"""LET's own state in a run's checkpoints.

torchtitan loads a checkpoint before the first step, with everything that it holds. What LET keeps there is only known
to be needed, and only exists, once that step is known: it is read then, from the checkpoint that the run has resumed
from. A checkpoint without it, of plain torchtitan or of a run with other settings, is no error.
"""

import os
from typing import Any

import torch.distributed.checkpoint as dcp
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer


def restore(name: str, stateful: Any, config: Trainer.Config, step: int) -> None:
    """Reads the state called `name` from the checkpoint that the run has resumed from; warns if it has none.

    Args:
        name: Its name in `checkpointer.states`.
        stateful: Anything with `state_dict` and `load_state_dict`.
        config: The student's configuration.
        step: The optimizer steps taken by then.
    """
    checkpoint: Any = config.checkpoint
    path = os.path.join(config.dump_folder, checkpoint.folder, f"step-{step}")
    if not os.path.isdir(path):
        path = checkpoint.initial_load_path
    reader = dcp.FileSystemReader(path)
    if not any(key.startswith(f"{name}.") for key in reader.read_metadata().state_dict_metadata):
        logger.warning(f"LET: {path} has no {name}: it starts afresh at step {step}")
        return
    # no_dist: with pipeline parallelism, the other stages may have no such state, and do not take part.
    state = {name: stateful.state_dict()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    stateful.load_state_dict(state[name])
