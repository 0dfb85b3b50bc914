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
from collections import ChainMap
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from let_plugin.config import load as toml_config
from let_plugin.config import plan
from let_plugin.runtime import data, host
from tests.support.fork_server import end_at_once
from tests.support.probe import record


def run(config_file, args, count):
    from torchtitan.observability import structured_logger

    from tests.support import hot_path
    from tests.support.leftovers import Leftovers

    config = toml_config.load(Path(config_file), args).config
    end_at_once()
    # torch refuses it where a graph is kept for a second backward pass, as zero-bubble schedules do, LET or not.
    torch._functorch.config.donated_buffer = "ZeroBubble" not in config.parallelism.pipeline_parallel_schedule
    torch._dynamo.reset()
    _clear_sharding_prop_cache()  # it keeps device meshes, and torch asks whether a mesh is the same, not equal
    structured_logger.init_structured_logger(source="training", output_dir=config.dump_folder, enable=False)
    host.adapt_model_spec(config.model_spec)
    handler, messages = logging.Handler(), []
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    trainer = config.build()
    steps = hot_path.watch(trainer, compiled=count == "compiled") if count else []
    leftovers, noted = Leftovers(trainer), record(trainer, num_steps=1)
    trainer.train()
    trainer.close()
    for group in list(dist.distributed_c10d._world.pg_map):  # each has threads, and there are many cases
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    logging.getLogger().removeHandler(handler)
    return {
        "gradients": noted["gradients"][0],
        "initial": noted["initial"] if plan.changes_the_start(config.let) else {},
        "logged": noted["logged"],
        "messages": messages,
        "watched": leftovers.watched,
        "leftovers": leftovers.alive,
        "steps": steps,
    }


def main():
    (cases,) = sys.argv[1:]
    device = host.set_up(os.environ.get("PROBE_DEVICE", "cpu"))
    # torchtitan keeps a group that is there already.
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group
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
        if errors:
            result = {"error": errors[0]}
        else:
            # A pipeline's stages have the parameters among them; the one that sees the loss logs last.
            result = {key: dict(ChainMap(*(rank[key] for rank in everybody))) for key in ("initial", "gradients")}
            result["logged"] = max((rank["logged"] for rank in everybody), key=lambda steps: steps[0]["loss"])
            result |= {key: everybody[0][key] for key in ("steps", "messages")}
            result |= {key: [rank[key] for rank in everybody] for key in ("watched", "leftovers")}
        if dist.get_rank() == 0:
            torch.save(result, case["out"])
            print(f"{case['name']}: {'failed' if errors else 'done'}", flush=True)
    # Without it, a rank that leaves first takes the connections down while another still sends.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
