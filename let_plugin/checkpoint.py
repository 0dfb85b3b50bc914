"""LET's own state in a run's checkpoints.

torchtitan loads a checkpoint before the first step, with everything that it holds. What LET keeps there is only known
to be needed, and only exists, once that step is known: it is read then, from the checkpoint that the run has resumed
from. A checkpoint without it, of plain torchtitan for one, is no error; one that holds the state of something else is.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.errors import ConfigError, Problem


class Identified(Stateful):
    """A state that says what it is the state of, so that it cannot be taken for another of the same shape.

    Args:
        inner: Anything with `state_dict` and `load_state_dict`.
        identity: What it is: the blocks and layers that it belongs to.
    """

    def __init__(self, inner: Any, identity: Sequence[int]) -> None:
        self._inner = inner
        self._identity = torch.tensor(identity)

    def state_dict(self) -> dict[str, Any]:
        return {**self._inner.state_dict(), "identity": self._identity.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if it is the state of something else."""
        if not torch.equal(state_dict["identity"], self._identity):
            raise ValueError(f"it is that of {state_dict['identity'].tolist()}, not of {self._identity.tolist()}")
        self._inner.load_state_dict({name: value for name, value in state_dict.items() if name != "identity"})


def restore(name: str, stateful: Any, config: Trainer.Config, step: int) -> None:
    """Reads the state called `name` from the checkpoint that the run has resumed from; warns if it has none.

    Args:
        name: Its name in `checkpointer.states`.
        stateful: Anything with `state_dict` and `load_state_dict`.
        config: The student's configuration.
        step: The optimizer steps taken by then.

    Raises:
        ConfigError: If it is there, but is that of a run with other `[let]` settings.
    """
    checkpoint: Any = config.checkpoint
    path = filesystem.join(filesystem.join(config.dump_folder, checkpoint.folder), f"step-{step}")
    if not filesystem.isdir(path):
        path = checkpoint.initial_load_path
    reader = FsspecReader(path) if filesystem.is_remote(path) else dcp.FileSystemReader(path)
    if not any(key.startswith(f"{name}.") for key in reader.read_metadata().state_dict_metadata):
        logger.warning(f"LET: {path} has no {name}: it starts afresh at step {step}")
        return
    state = {name: stateful.state_dict()}
    try:
        # no_dist: with pipeline parallelism, the other stages may have no such state, and do not take part.
        dcp.load(state, storage_reader=reader, no_dist=True)
        stateful.load_state_dict(state[name])
    except (ValueError, CheckpointException) as error:  # the latter is no Exception, only a BaseException
        first = str(error).strip().splitlines()[0]
        message = f"the checkpoint {path} has a {name} of other settings ({first}); resume with those, or start afresh"
        raise ConfigError(Problem("let", message)) from error
