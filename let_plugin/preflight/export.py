"""`let-teacher export CONFIG.toml --out DIR`: the command line.

export_plan.py says what is to be written, export_rows.py writes it.

The teacher runs over the same rows, in the same batches, as it would beside the student, which is never built. Each
data-parallel rank of the run to come has a stream of rows of its own; the processes of the export share the streams. An
export that was interrupted goes on: it runs through the data again and leaves out what is stored.
"""

import argparse
import os
from typing import Any

_DESCRIPTION = """\
Runs the teacher of a training configuration once over the data of its first S_stop steps and writes its states to DIR.
A run with let.teacher.features = "DIR" reads them and loads no teacher. On N processes: torchrun --nproc-per-node N -m
let_plugin.teacher.export CONFIG.toml --out DIR. Further options (--section.key VALUE) override the configuration, as
let-train takes them."""
_DEGREE_HELP = """data-parallel ranks of the training run; the configuration's if it states them, else the number of
processes of the export"""


def add_parser(subparsers: Any) -> None:
    """Adds `export` to the subcommands of a command line, which gives it what it does not know as `overrides`."""
    summary = "write the teacher's states of a run's data, so that the run needs no teacher"
    parser = subparsers.add_parser("export", help=summary, description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG.toml", help="the training configuration, as let-train takes it")
    parser.add_argument("--out", metavar="DIR", help="where to; let.teacher.features if that is set")
    parser.add_argument("--check", action="store_true", help="print the storage needed, and run nothing")
    encoding_help = "how the states are stored (bfloat16)"
    parser.add_argument("--encoding", choices=("bfloat16", "int8"), default="bfloat16", help=encoding_help)
    parser.add_argument("--data-parallel-degree", type=int, metavar="N", help=_DEGREE_HELP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Exports, or prints what that would take. ConfigError for bad input, before anything is written."""
    from let_plugin.config import load as toml_config
    from let_plugin.runtime import host

    source = toml_config.read([args.config, *args.overrides])
    host.set_up(source.runtime.device)
    loaded = toml_config.resolve(source)

    import torch
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.tools import utils
    from torchtitan.tools.logging import init_logger

    from let_plugin.preflight import export_rows
    from let_plugin.preflight.export_plan import Plan
    from let_plugin.runtime import data

    data.register()
    plan = loaded.apply(lambda config: Plan.make(config, args, int(os.environ["WORLD_SIZE"])))
    if os.environ["RANK"] == "0":
        print(plan.report(), flush=True)
    if args.check:
        return
    plan.check_folder()
    init_logger()
    utils.device_module.set_device(utils.get_local_device())
    dist_utils.init_distributed(plan.config.comm, base_folder=plan.config.dump_folder)
    try:
        export_rows.export(plan)
    finally:
        torch.distributed.destroy_process_group()
