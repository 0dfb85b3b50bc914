"""LET's own state in a run's checkpoints.

torchtitan loads a checkpoint before the first step. LET's own state exists only once that step is known, and is read
then, from the checkpoint that the run resumed from. A checkpoint without it (of plain torchtitan) is not an error; one
with the state of other settings is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import dcp_files
from let_plugin.runtime.upstream import TRAIN_STATE, CheckpointManager, latest_checkpoint_step


class Identified(Stateful):
    """A state that is saved with the numbers of the blocks and layers that it belongs to, and refuses that of others.

    `inner` is anything with `state_dict` and `load_state_dict`.
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
    """Reads a state from the checkpoint that the run has resumed from, at optimizer step `step`; warns if it has none.

    `name` is its name in `checkpointer.states`, `stateful` anything with `state_dict` and `load_state_dict`.
    ConfigError if it refuses the state, as that of a run with other `[let]` settings.
    """
    path: str = filesystem.join(_folder(config), f"step-{step}")
    if not filesystem.isdir(path):
        path = config.checkpoint.initial_load_path
    if not read(name, stateful, path):
        logger.warning(f"LET: {path} has no {name}: it starts afresh at step {step}")


def read(name: str, stateful: Any, path: str) -> bool:
    """Reads the state called `name` from the checkpoint at `path`; False if it has none. Needs no process group.

    ConfigError as for `restore`.
    """
    reader = dcp_files.open_checkpoint(path)
    try:
        names = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("let", f"the checkpoint {path} cannot be read: {error}")) from error
    if not any(key.startswith(f"{name}.") for key in names):
        return False
    state = {name: stateful.state_dict()}
    try:
        # By this process alone: in a pipeline, the other stages may have no such state, and do not take part.
        dcp_files.load(state, reader)
        stateful.load_state_dict(state[name])
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        message = f"the checkpoint {path} has a {name} of other settings ({first}); resume with those, or start afresh"
        raise ConfigError(Problem("let", message)) from error
    return True


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that a run goes on from."""

    path: str
    steps_taken: int  # optimizer steps
    num_data_parallel: int | None = None  # ranks whose places in the data it has; None: not known


def find(config: Trainer.Config) -> Resumption | None:
    """The checkpoint that torchtitan will resume from; None for a run that starts at step 0. Reads no weights.

    ConfigError if the checkpoint that the configuration asks for is missing or cannot be read.
    """
    settings: Any = config.checkpoint
    if not settings.enable or settings.create_seed_checkpoint or not isinstance(settings, CheckpointManager.Config):
        return None
    folder, step = _folder(config), settings.load_step
    if step == -1:
        step = latest_checkpoint_step(folder)
    key, path, model_only = "load_step", filesystem.join(folder, f"step-{step}"), step == 0
    if step == -1:
        key, path, model_only = "initial_load_path", settings.initial_load_path, settings.initial_load_model_only
    if not path:
        return None
    if not filesystem.isdir(path):
        raise ConfigError(Problem(f"checkpoint.{key}", f"there is no checkpoint {path}", getattr(settings, key)))
    if model_only or TRAIN_STATE in settings.exclude_from_loading:
        return None
    state: dict[str, Any] = {TRAIN_STATE: {"step": 0}}
    is_weights = False
    try:
        reader = dcp_files.open_checkpoint(path)
        names = reader.read_metadata().state_dict_metadata
        if is_weights := f"{TRAIN_STATE}.step" not in names:
            raise ValueError("it has weights only; checkpoint.initial_load_model_only = true starts from them")
        # A loader of the user's own may share its places among any number of ranks.
        is_titans = type(config.dataloader).__module__.startswith("torchtitan.")
        if is_titans and "dataloader.world_size" in names and "dataloader" not in settings.exclude_from_loading:
            state["dataloader"] = {"world_size": None}
        dcp_files.load(state, reader)
    except Exception as error:
        message = f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}".splitlines()[0]
        is_weights = is_weights or any(name.endswith(".safetensors") for name in filesystem.listdir(path))
        if key == "load_step" and is_weights:
            message = f"{path} has the weights of a run that has ended, no more; take another dump_folder or load_step"
            message += " (checkpoint.last_save_model_only = false saves the rest, too)"
        raise ConfigError(Problem(f"checkpoint.{key}", message, getattr(settings, key))) from error
    return Resumption(path, state[TRAIN_STATE]["step"], state.get("dataloader", {}).get("world_size"))


def _folder(config: Trainer.Config) -> str:
    return filesystem.join(config.dump_folder, config.checkpoint.folder)
