"""The console command `let-teacher`: what there is to do with a teacher before a run.

Nothing large is imported until a subcommand runs.
"""

import argparse
import os
from typing import Any

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, exit_with
from let_plugin.preflight import inspection

_EXPORT = """\
Runs the teacher of a training configuration once over the data of its first S_stop steps and writes its states to DIR.
A run with let.teacher.features = "DIR" reads them and loads no teacher. On N processes: torchrun --nproc-per-node N -m
let_plugin.preflight.teacher_cli export CONFIG.toml --out DIR. Further options override the configuration, as let-train
takes them: --parallelism.data_parallel_shard_degree, if the run will have other data-parallel ranks than the export."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; SystemExit with code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="let-teacher", description="Teachers for Late-to-Early Training.")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    inspection.add_parser(subparsers)
    add_export(subparsers)
    add_tokenizer(subparsers)
    args, overrides = parser.parse_known_args(argv)
    if overrides and args.command != "export":  # only an export has a configuration to override
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.overrides = overrides
    try:
        args.run(args)
    except ConfigError as error:
        exit_with(error, f"let-teacher {args.command}")


def add_export(subparsers: Any) -> None:
    """Adds the subcommand `export`."""
    summary = "write the teacher's states of a run's data, so that the run needs no teacher"
    parser = subparsers.add_parser("export", help=summary, description=_EXPORT, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG.toml", help="the training configuration, as let-train takes it")
    parser.add_argument("--out", metavar="DIR", help="where to; let.teacher.features if that is set")
    parser.add_argument("--check", action="store_true", help="print the storage needed, and run nothing")
    parser.add_argument("--encoding", choices=("bfloat16", "int8"), default="bfloat16", help="of the states (bfloat16)")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    """Exports, or prints what that would take. ConfigError for bad input, before anything is written."""
    from let_plugin.config import load as toml_config
    from let_plugin.runtime import host

    source = toml_config.read([args.config, *args.overrides])
    host.set_up(source.runtime.device)
    loaded = toml_config.resolve(source)

    import torch
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.tools import utils

    from let_plugin.preflight import export_rows
    from let_plugin.preflight.export_plan import Plan
    from let_plugin.runtime import console, data

    data.register()
    plan = loaded.apply(lambda config: Plan.make(config, args, int(os.environ["WORLD_SIZE"])))
    if os.environ["RANK"] == "0":
        print(plan.report(), flush=True)
    if args.check:
        return
    plan.check_folder()
    console.show(source.runtime.log)
    utils.device_module.set_device(utils.get_local_device())
    dist_utils.init_distributed(plan.config.comm, base_folder=plan.config.dump_folder)
    try:
        export_rows.export(plan)
    finally:
        torch.distributed.destroy_process_group()


def add_tokenizer(subparsers: Any) -> None:
    """Adds the subcommand `tokenizer`."""
    summary = "write a .gguf file's tokenizer in the form that torchtitan reads, so that a student can be trained on it"
    parser = subparsers.add_parser("tokenizer", help=summary, description=summary)
    parser.add_argument("path", metavar="FILE.gguf", help="as let.teacher.path")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write it to")
    parser.set_defaults(run=_tokenizer)


def _tokenizer(args: argparse.Namespace) -> None:
    from let_plugin.preflight.checks import check_writable
    from let_plugin.teacher.base import bad_path, require

    require("transformers")
    from let_plugin.teacher.hf.checkpoint import Checkpoint

    check_writable("--out", args.out)
    tokenizer: Any = Checkpoint(TeacherConfig(path=args.path)).tokenizer()
    if not hasattr(tokenizer, "save_pretrained") or tokenizer.eos_token is None:
        raise bad_path(args.path, "no .gguf file with a tokenizer that has an end-of-sequence token")
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}/tokenizer.json")


if __name__ == "__main__":
    main()
