"""Trains many configurations one after the other in one job, so that starting processes does not take all the time.

    torchrun ... -m tests.support.matrix CASES.json         PROBE_DEVICE=auto takes the accelerator

CASES.json lists {"name", "config" (a TOML file), "args", "out", "count"}. The file `out` gets {"error": traceback}, or:

    gradients             of the first step, as the optimizer got them
    initial               the weights before it, if `[let.init]` has set some
    logged                the numbers of each step
    messages              what rank 0 said
    watched, leftovers    of each rank, what of the alignment there was, and was left after its end: see leftovers.py
    steps                 what rank 0 did in each step, if `count` is "eager" or "compiled": see hot_path.py
"""

import json
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from let_plugin.config import load as toml_config
from let_plugin.config import plan
from let_plugin.runtime import data, host
from tests.support.probe import full


class Messages(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def run(config_file, args, count):
    import torchtitan.trainer
    from torchtitan.components.checkpointer.utils import canonical_fqn
    from torchtitan.observability import structured_logger

    from tests.support import hot_path
    from tests.support.leftovers import Leftovers

    config = toml_config.load(Path(config_file), args).config
    torchtitan.trainer.time.sleep = lambda seconds: None  # "for other ranks to complete"
    # torch refuses it where a graph is kept for a second backward pass, as zero-bubble schedules do, LET or not.
    torch._functorch.config.donated_buffer = "ZeroBubble" not in config.parallelism.pipeline_parallel_schedule
    torch._dynamo.reset()
    _clear_sharding_prop_cache()  # it keeps device meshes, and torch asks whether a mesh is the same, not equal
    structured_logger.init_structured_logger(source="training", output_dir=config.dump_folder, enable=False)
    host.adapt_model_spec(config.model_spec)
    logging.getLogger().addHandler(said := Messages())
    trainer = config.build()
    steps = hot_path.watch(trainer, compiled=count == "compiled") if count else []
    leftovers = Leftovers(trainer)

    def named():  # a projector comes with the first step
        return [(canonical_fqn(name), p) for part in trainer.model_parts for name, p in part.named_parameters()]

    initial = {name: full(p) for name, p in named() if plan.changes_the_start(config.let)}
    gradients, logged = {}, []

    def before_step(*_):
        if gradients:
            return
        gradients.update({name: full(p.grad) for name, p in named() if p.grad is not None})

    next(iter(trainer.optimizers)).register_step_pre_hook(before_step)
    log = trainer.metrics_processor.logger.log

    def record(metrics, step):
        log(metrics, step)
        if "grad_norm" not in metrics:
            return  # a validation's
        logged.append({"loss": metrics["loss_metrics/global_avg_loss"], "grad_norm": metrics["grad_norm"]})
        logged[-1] |= trainer._logged_metrics

    trainer.metrics_processor.logger.log = record
    trainer.train()
    trainer.close()
    logging.getLogger().removeHandler(said)
    own = {"initial": initial, "gradients": gradients, "logged": logged, "steps": steps, "messages": said.messages}
    return own | {"watched": leftovers.watched, "leftovers": leftovers.alive}


def main():
    (cases,) = sys.argv[1:]
    device = host.set_up(os.environ.get("PROBE_DEVICE", "cpu"))
    # torchtitan keeps a group that is there already.
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    logging.getLogger().setLevel(logging.INFO)
    data.register()
    for case in json.loads(Path(cases).read_text()):
        try:
            own = run(case["config"], case["args"], case["count"])
        except BaseException:  # SystemExit too: the next case is to run all the same
            own = {"error": traceback.format_exc()}
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, own)
        errors = [rank["error"] for rank in everybody if "error" in rank]
        # A pipeline's stages have the parameters among them; the one that sees the loss logs last.
        result = (
            {"error": errors[0]}
            if errors
            else {
                **{
                    tensors: {name: tensor for rank in everybody for name, tensor in rank[tensors].items()}
                    for tensors in ("initial", "gradients")
                },
                "logged": max((rank["logged"] for rank in everybody), key=lambda steps: steps[0]["loss"]),
                "steps": everybody[0]["steps"],
                "messages": everybody[0]["messages"],
                "watched": [rank["watched"] for rank in everybody],
                "leftovers": [rank["leftovers"] for rank in everybody],
            }
        )
        if dist.get_rank() == 0:
            torch.save(result, case["out"])
            print(f"{case['name']}: {'failed' if errors else 'done'}", flush=True)
    # Without it, a rank that leaves first takes the connections down while another still sends.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
