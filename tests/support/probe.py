"""Runs that record what the optimizer sees.

    python -m tests.support.probe OUT.pt CONFIG.toml ...         let-train
    python -m tests.support.probe OUT.pt --plain ...             torchtitan's own Trainer on tests.support.tiny

Rank 0 writes: initial and final parameters, the gradients of every step as the optimizer gets them, the batches, the
learning rates, what torchtitan logged, and what is left at the end of the hooks on the model and its blocks and of the
teacher's modules.
PROBE_KILL_AT_STEP kills the process (SIGKILL) before that step. PROBE_DEVICE=auto takes the accelerator.
PROBE_WITHOUT names a package that is as good as not installed.
"""

import os
import signal
import sys
import weakref
from importlib.machinery import PathFinder

import torch
from torch.distributed.tensor import DTensor

from let_plugin import train
from let_plugin.runtime import data, host


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def record(trainer, out):
    from torchtitan.components.checkpointer.utils import canonical_fqn

    named = {canonical_fqn(n): p for part in trainer.model_parts for n, p in part.named_parameters()}
    log = {"initial": {n: full(p) for n, p in named.items()}, "gradients": [], "lrs": [], "batches": [], "logged": []}

    in_train_step = False

    def before_optimizer_step(optimizer, *_):
        if not in_train_step:
            return  # torchtitan takes an empty step before it loads an optimizer's state
        log["gradients"].append({n: full(p.grad) for n, p in named.items()})
        log["lrs"].append(optimizer.param_groups[0]["lr"])

    for optimizer in trainer.optimizers:
        optimizer.register_step_pre_hook(before_optimizer_step)

    record_batches(trainer, log)
    log_metrics = trainer.metrics_processor.log

    def record_metrics(step, loss, max_loss, grad_norm, **kwargs):
        log["logged"].append({"step": step, "loss": loss, "grad_norm": grad_norm})
        log_metrics(step, loss, max_loss, grad_norm, **kwargs)

    trainer.metrics_processor.log = record_metrics

    teachers = []
    train_step = trainer.train_step

    def train_step_or_die(data_iterator):
        if str(trainer.step) == os.environ.get("PROBE_KILL_AT_STEP"):
            os.kill(os.getpid(), signal.SIGKILL)
        nonlocal in_train_step
        in_train_step = True
        train_step(data_iterator)
        in_train_step = False
        guidance = getattr(trainer, "guidance", None)
        if guidance is not None and guidance.teacher is not None and not teachers:
            teachers.extend(weakref.ref(module) for module in guidance.teacher.modules())

    trainer.train_step = train_step_or_die

    before = num_hooks(trainer)
    close = trainer.close

    def write_and_close():
        log["final"] = {n: full(p) for n, p in named.items()}
        log["added_hooks"] = num_hooks(trainer) - before
        log["teacher_modules_alive"] = sum(ref() is not None for ref in teachers)
        if torch.distributed.get_rank() == 0:
            torch.save(log, out)
        close()

    trainer.close = write_and_close


def record_batches(trainer, log):
    post_dataloading_process = trainer.post_dataloading_process

    def record_batch(input_dict, labels):
        batch = (input_dict["input"], input_dict["positions"], labels)
        # Through numpy: the tensors themselves get torchtitan's annotations, which are not data.
        log["batches"].append(tuple(torch.from_numpy(t.cpu().numpy().copy()) for t in batch))
        return post_dataloading_process(input_dict, labels)

    trainer.post_dataloading_process = record_batch


def num_hooks(trainer):
    modules = [module for part in trainer.model_parts for module in (part, *part.layers.values())]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


class Without(PathFinder):
    """Finds modules as Python does, but for those of one package."""

    def __init__(self, package):
        self._package = package

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == self._package else PathFinder.find_spec(name, path, target)


def main():
    out, *argv = sys.argv[1:]
    if without := os.environ.get("PROBE_WITHOUT"):
        sys.meta_path[sys.meta_path.index(PathFinder)] = Without(without)
    host.set_up(os.environ.get("PROBE_DEVICE", "cpu"))
    from torchtitan.trainer import Trainer

    init = Trainer.__init__

    def recording_init(self, config):
        init(self, config)
        record(self, out)

    Trainer.__init__ = recording_init
    if argv[0] != "--plain":
        train.main(argv)
        return

    from torchtitan.config import ConfigManager

    data.register()
    config = ConfigManager().parse_args(["--module", "tests.support", "--config", "tiny", *argv[1:]])
    host.adapt_model_spec(config.model_spec)
    trainer = config.build()
    assert type(trainer) is Trainer
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    main()
