"""`python -m tests.support.probe OUT.pt CONFIG.toml ...`: let-train that records what the optimizer sees.

Rank 0 writes: initial and final parameters, the gradients of every step as the optimizer gets them, the batches, the
learning rates.
"""

import sys

import torch
from torch.distributed.tensor import DTensor

from let_plugin import train
from let_plugin.trainer import LetTrainerMixin


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def record(trainer, out):
    named = {n: p for part in trainer.model_parts for n, p in part.named_parameters()}
    log = {"initial": {n: full(p) for n, p in named.items()}, "gradients": [], "lrs": [], "batches": []}

    def before_optimizer_step(optimizer, *_):
        log["gradients"].append({n: full(p.grad) for n, p in named.items()})
        log["lrs"].append(optimizer.param_groups[0]["lr"])

    for optimizer in trainer.optimizers:
        optimizer.register_step_pre_hook(before_optimizer_step)

    post_dataloading_process = trainer.post_dataloading_process

    def record_batch(input_dict, labels):
        log["batches"].append((input_dict["input"], input_dict["positions"], labels))
        return post_dataloading_process(input_dict, labels)

    trainer.post_dataloading_process = record_batch

    close = trainer.close

    def write_and_close():
        log["final"] = {n: full(p) for n, p in named.items()}
        if torch.distributed.get_rank() == 0:
            torch.save(log, out)
        close()

    trainer.close = write_and_close


def main():
    out, *argv = sys.argv[1:]
    init = LetTrainerMixin.__init__

    def recording_init(self, config):
        init(self, config)
        record(self, out)

    LetTrainerMixin.__init__ = recording_init
    train.main(argv)


if __name__ == "__main__":
    main()
