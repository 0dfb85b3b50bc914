"""A clean end: a run that is asked to end finishes its step, saves a checkpoint to go on from, and exits with code 0.

SIGTERM asks for it, and SIGUSR1, which Slurm can send before a job's time is up. A signal may reach one rank alone, so
about once a second, or after each step if that takes longer, the ranks tell each other whether one has come. They do so
on the CPU while the next step is under way, and nobody waits for a rank that is less than a step behind: with several
processes the run ends one step later, or one second.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One request may arrive several times: `timeout` sends it to the process and to its group, torchrun hands it on.
_SAME_REQUEST_SECONDS = 5.0
_TELL_SECONDS, _TELL_STEPS = 1.0, 100  # the ranks tell each other after so long, but at the latest after so many steps


class CleanEnd:
    """While it is entered, around `trainer.train()` on every rank, signals are requests to end.

    The same signal once more, some seconds later, ends the process at once. A signal that the caller handles, or
    ignores, is left to it, and outside the main thread, where Python handles none, all are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._came: dict[int, float] = {}
        self._handled: list[signal.Signals] = []
        self._group: Any = None
        self._told: tuple[Any, torch.Tensor] | None = None
        self._told_at, self._steps, self._pause = 0.0, 0, 0  # when, how many steps ago, and after how many again

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handled = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        for number in self._handled:
            signal.signal(number, self._note)
        loader: Any = self._trainer.dataloader
        if isinstance(loader, DataLoader) and loader.worker_init_fn is None:
            loader.worker_init_fn = _leave_the_process_group
        if dist.get_world_size() > 1 and dist.get_backend() != "fake":
            self._group = dist.new_group(backend="gloo")
            self._told_at = time.monotonic()

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        if self._told is not None and error_type is None:
            self._told[0].wait()  # or the first rank to leave would cut it off

    def after_step(self) -> None:
        """Makes the step that has just been taken the run's last one, the same on every rank, if it is to end.

        Collective; to be called before torchtitan saves the step's checkpoint.
        """
        number = next(iter(self._came), 0)
        if self._group is not None:
            number = self._tell(number)
        trainer, settings = self._trainer, self._trainer.config.checkpoint
        if not number or trainer.step == trainer.config.training.steps:
            return
        # What torchtitan decides by, on its last step and on what it saves of it: all that a resumed run needs, even if
        # nothing but the weights is to be kept of a run that is complete; and not in the background.
        trainer.config.training.steps = trainer.step
        text = f"LET: step {trainer.step}: {signal.Signals(number).name} asks the run to end"
        if settings.enable and not settings.load_only:
            checkpointer: Any = trainer.checkpointer
            checkpointer.last_save_model_only = checkpointer.last_save_in_hf = False
            logger.info(f"{text}; it can go on from the checkpoint of this step")
        else:
            logger.warning(f"{text}; nothing is saved of it (checkpoint.enable)")

    def _tell(self, own: int) -> int:
        """The signal of any rank, the same after the same step on all; 0 if there is none, or it is not known yet."""
        number = 0
        self._steps += 1
        if self._told is not None:
            self._told[0].wait()
            of_all, self._told = self._told[1], None
            number, self._pause = int(of_all[0]), min(int(_TELL_SECONDS / of_all[1]), _TELL_STEPS)
        if self._steps >= self._pause:
            now = time.monotonic()
            ours = torch.tensor([own, (now - self._told_at) / self._steps], dtype=torch.float64)
            work: Any = dist.all_reduce(ours, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._told, self._told_at, self._steps = (work, ours), now, 0
        return number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._came.setdefault(number, time.monotonic()) > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _leave_the_process_group(worker_id: int) -> None:
    """A data loader's worker would die of a signal to the run's process group, and the run of that."""
    os.setpgid(0, 0)
