"""Runs that record what the optimizer sees.

    python -m tests.support.probe OUT.pt CONFIG.toml ...         let-train
    python -m tests.support.probe OUT.pt --plain ...             torchtitan's own Trainer on tests.support.tiny

Rank 0 writes what `record` notes, and the final parameters.
PROBE_KILL_AT_STEP kills the process (SIGKILL) before that step, PROBE_END_AT_STEP has its last rank asked to end, by a
SIGTERM to the rank's process group. PROBE_DEVICE=auto takes the accelerator.
PROBE_WITHOUT names a package that is as good as not installed.
"""

import os
import signal
import sys
from importlib.machinery import PathFinder

import torch
from tokenizers import Tokenizer
from torch.distributed.tensor import DTensor

from let_plugin import train
from let_plugin.demo import TOKENIZER
from let_plugin.runtime import data, host


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def parameters_of(trainer):
    from torchtitan.components.checkpointer.utils import canonical_fqn

    return {canonical_fqn(name): p for part in trainer.model_parts for name, p in part.named_parameters()}


def workers_have_threads():
    """Whether the tokenizers library has threads in what is forked off now, as a data loader's workers are."""
    tokenizer = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")
    if (pid := os.fork()) == 0:
        tokenizer.encode_batch(["some text"] * 1000)
        os._exit(len(os.listdir("/proc/self/task")) > 1)
    return os.waitpid(pid, 0)[1] != 0 or os.cpu_count() == 1


def record(trainer, num_steps=sys.maxsize):
    """Watches a trainer that has been built; returns a dict of what grows as it trains.

    `initial` parameters; of the first `num_steps` steps the `batches`, the `gradients` as the optimizer gets them, and
    the learning rates (`lrs`); and the numbers that are `logged` in each step.
    """
    initial = {name: full(p) for name, p in parameters_of(trainer).items()}
    noted = {"initial": initial, "gradients": [], "lrs": [], "batches": [], "logged": []}
    in_train_step = False

    def before_optimizer_step(optimizer, *_):
        # torchtitan takes an empty step before it loads an optimizer's state.
        if in_train_step and len(noted["gradients"]) < num_steps:
            named = parameters_of(trainer)  # a projector comes with the first step
            noted["gradients"].append({name: full(p.grad) for name, p in named.items() if p.grad is not None})
            noted["lrs"].append(optimizer.param_groups[0]["lr"])

    next(iter(trainer.optimizers)).register_step_pre_hook(before_optimizer_step)
    train_step, process = trainer.train_step, trainer.post_dataloading_process
    logger = trainer.metrics_processor.logger
    logger = getattr(logger, "_inner", logger)  # it gets what LET has added
    log = logger.log

    def train_step_or_die(data_iterator):
        nonlocal in_train_step
        if str(trainer.step) == os.environ.get("PROBE_KILL_AT_STEP"):
            os.kill(os.getpid(), signal.SIGKILL)
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if str(trainer.step) == os.environ.get("PROBE_END_AT_STEP") and is_last:
            os.killpg(0, signal.SIGTERM)
        in_train_step = True
        train_step(data_iterator)
        in_train_step = False

    def note_batch(input_dict, labels):
        if len(noted["gradients"]) < num_steps:
            batch = (input_dict["input"], input_dict["positions"], labels)
            # Through numpy: the tensors themselves get torchtitan's annotations, which are not data.
            noted["batches"].append(tuple(torch.from_numpy(t.cpu().numpy().copy()) for t in batch))
        return process(input_dict, labels)

    def note_metrics(metrics, step):
        log(metrics, step)
        if "grad_norm" in metrics:  # not a validation's
            own = {"loss": metrics["loss_metrics/global_avg_loss"], "grad_norm": metrics["grad_norm"]}
            noted["logged"].append(own | {name: x for name, x in metrics.items() if name.startswith("let")})

    trainer.train_step, trainer.post_dataloading_process = train_step_or_die, note_batch
    logger.log = note_metrics
    return noted


def main():
    out, *argv = sys.argv[1:]
    if without := os.environ.get("PROBE_WITHOUT"):
        find = PathFinder.find_spec
        PathFinder.find_spec = lambda name, *args: None if name.partition(".")[0] == without else find(name, *args)
    host.set_up(os.environ.get("PROBE_DEVICE", "cpu"))
    from let_plugin.runtime import ending

    ending._TELL_SECONDS = 0.0  # however long a step takes, they do it after each

    def watch(trainer):
        noted, close = record(trainer) | {"workers_have_threads": workers_have_threads()}, trainer.close

        def write_and_close():
            final = {name: full(p) for name, p in parameters_of(trainer).items()}
            if torch.distributed.get_rank() == 0:
                torch.save(noted | {"final": final}, out)
            close()

        trainer.close = write_and_close

    if argv[0] != "--plain":
        train.main(argv, on_built=watch)
        return

    from torchtitan.config import ConfigManager
    from torchtitan.trainer import Trainer

    data.register()
    config = ConfigManager().parse_args(["--module", "tests.support", "--config", "tiny", *argv[1:]])
    host.adapt_model_spec(config.model_spec)
    trainer = config.build()
    assert type(trainer) is Trainer
    watch(trainer)
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    main()
