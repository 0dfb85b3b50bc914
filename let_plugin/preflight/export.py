"""`let-teacher export CONFIG.toml --out DIR`: what it is to write, checked. The rows are written by export_rows.py.

The teacher runs over the same rows, in the same batches, as it would beside the student, which is never built. Each
data-parallel rank of the run to come has a stream of rows of its own; the processes of the export share the streams. An
export that was interrupted goes on: it runs through the data again and leaves out what is stored.
"""

import argparse
import copy
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from let_plugin.config.errors import ConfigError, Problem, suggest

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

_DESCRIPTION = """\
Runs the teacher of a training configuration once over the data of its first S_stop steps and writes its states to DIR.
A run with let.teacher.features = "DIR" reads them and loads no teacher. On N processes: torchrun --nproc-per-node N -m
let_plugin.teacher.export CONFIG.toml --out DIR. Further options (--section.key VALUE) override the configuration, as
let-train takes them."""
_SHARD_BYTES = 2**26  # what an interruption loses at most, of each process
_DEGREE_HELP = """data-parallel ranks of the training run; the configuration's if it states them, else the number of
processes of the export"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `export` to the subcommands of a command line, which gives it what it does not know as `overrides`."""
    summary = "write the teacher's states of a run's data, so that the run needs no teacher"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export", help=summary, description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="the training configuration, as let-train takes it")
    parser.add_argument("--out", metavar="DIR", help="where to; let.teacher.features if that is set")
    parser.add_argument("--check", action="store_true", help="print the storage needed, and run nothing")
    parser.add_argument("--encoding", metavar="NAME", default="bfloat16", help="bfloat16 or int8 (bfloat16)")
    parser.add_argument("--data-parallel-degree", type=int, metavar="N", help=_DEGREE_HELP)
    parser.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line of this module alone; SystemExit with code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="let-teacher", allow_abbrev=False)
    add_parser(parser.add_subparsers(required=True))
    args, overrides = parser.parse_known_args(["export", *(sys.argv[1:] if argv is None else argv)])
    args.overrides = overrides
    try:
        run(args)
    except ConfigError as error:
        from let_plugin.train import exit_with

        exit_with(error, "let-teacher export")


def run(args: argparse.Namespace) -> None:
    """Exports, or prints what that would take. ConfigError for bad input, before anything is written.

    Args:
        args: As `add_parser` names them, and `overrides`, the configuration's options.
    """
    from let_plugin.config import load as toml_config

    argv = [args.config, *args.overrides]
    source = toml_config.read(argv)

    from let_plugin.runtime import host

    host.set_up(source.runtime.device)
    loaded = toml_config.resolve(source)

    from let_plugin.runtime import data

    data.register()
    plan = loaded.apply(lambda config: Plan.make(config, args, int(os.environ["WORLD_SIZE"])))
    if os.environ["RANK"] == "0":
        print(plan.report(), flush=True)
    if args.check:
        return
    plan.check_folder()

    import torch
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.tools import utils
    from torchtitan.tools.logging import init_logger

    from let_plugin.preflight.export_rows import export

    init_logger()
    utils.device_module.set_device(utils.get_local_device())
    dist_utils.init_distributed(plan.config.comm, base_folder=plan.config.dump_folder)
    try:
        export(plan)
    finally:
        torch.distributed.destroy_process_group()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be exported.

    Attributes:
        config: The run's configuration, with the teacher in place of stored states and data parallelism alone.
        batch_size: Rows that its data loader yields at a time.
        layers: Whose states are written.
        settings: Of the manifest.
        folder: Where to.
        num_processes: Of the export.
        rows_per_shard: Rows of each file but the last.
    """

    config: "Trainer.Config"
    batch_size: int
    layers: list[int | str]
    settings: dict[str, Any]
    folder: Path
    num_processes: int
    rows_per_shard: int

    @staticmethod
    def make(config: "Trainer.Config", args: argparse.Namespace, num_processes: int) -> "Plan":
        """ConfigError if the run or the export is not as it should be. Reads no weights, writes nothing."""
        from let_plugin.config import plan
        from let_plugin.preflight import checks as preflight
        from let_plugin.teacher.open import open_source
        from let_plugin.teacher.stored.shards import bytes_per_token

        out = args.out or config.let.teacher.features
        degree = _data_parallel_degree(config, args.data_parallel_degree, num_processes)
        if problems := _problems(config, args, out):
            raise ConfigError(problems)
        is_pipelined = config.parallelism.pipeline_parallel_degree > 1
        training, parallelism = config.training, config.parallelism
        batch_size = parallelism.pipeline_parallel_microbatch_size if is_pipelined else training.local_batch_size
        config = _alone(config, degree)
        preflight.run(config, degree)
        source = open_source(config.let.teacher)
        layers = plan.teacher_layers(plan.pairs(config, source.info.num_layers))
        widths = {str(layer): source.info.width(layer, config.let.teacher.final_norm) for layer in layers}
        bytes_per_row = training.seq_len * sum(bytes_per_token(args.encoding, width) for width in widths.values())
        return Plan(
            config=config,
            batch_size=batch_size,
            layers=layers,
            settings=_settings(config, source.info, widths, layers, args.encoding, batch_size, degree),
            folder=Path(out),
            num_processes=num_processes,
            rows_per_shard=max(1, _SHARD_BYTES // bytes_per_row),
        )

    @property
    def num_rows(self) -> int:
        return self.settings["rows_per_rank"] * self.settings["data_parallel_degree"]

    @property
    def num_bytes(self) -> int:
        """What is stored of `num_rows` different rows, in bytes; headers not counted."""
        from let_plugin.teacher.stored.shards import KEY_BYTES

        return self.num_rows * (self._bytes_per_token * self.settings["seq_len"] + KEY_BYTES)

    @property
    def _bytes_per_token(self) -> int:
        from let_plugin.teacher.stored.shards import bytes_per_token

        return sum(bytes_per_token(self.settings["encoding"], width) for width in self.settings["widths"].values())

    def report(self) -> str:
        """For people: how much there is to write."""
        settings, widths = self.settings, self.settings["widths"]
        tokens = self.num_rows * settings["seq_len"]
        free = shutil.disk_usage(_existing(self.folder)).free
        return "\n".join(
            [
                "LET export",
                f"  teacher    {settings['teacher']['info']['description']}, {settings['teacher']['dtype']}",
                f"  layers     {', '.join(f'{layer} (width {width})' for layer, width in widths.items())}",
                f"  rows       {self.num_rows:,} of {settings['seq_len']:,} tokens, {tokens:,} tokens in all: "
                f"{settings['rows_per_rank']:,} rows of each of {settings['data_parallel_degree']} data-parallel ranks",
                f"  storage    {_size(self.num_bytes):>10}  {self._bytes_per_token:,} B/token, {settings['encoding']}",
                f"  free       {_size(free):>10}  at {self.folder}",
            ]
        )

    def check_folder(self) -> None:
        """ConfigError if the folder has something else in it, a complete export, or not enough space."""
        from let_plugin.teacher.stored.features import MANIFEST, Manifest
        from let_plugin.teacher.stored.shards import shard_paths

        stored, message = 0, ""
        existing = _existing(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            message = "a file; give a folder"
        elif (self.folder / MANIFEST).exists():
            manifest = Manifest.read(self.folder)
            stored = sum(path.stat().st_size for path in shard_paths(self.folder))
            if names := _differences(manifest.settings, self.settings):
                message = f"holds an export of other settings ({', '.join(names)}); give another folder"
            elif manifest.result is not None:
                message = "holds this export already, and it is complete"
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            message = "is not empty and holds no export; give another folder"
        elif not os.access(existing, os.W_OK):
            message = f"{existing} is not writable; give another folder"
        needed, free = self.num_bytes - stored, shutil.disk_usage(existing).free
        if not message and needed > free:
            message = f"needs {_size(needed)}, and {_size(free)} are free; see --encoding, and --check"
        if message:
            raise ConfigError(Problem("--out", message, str(self.folder)))


def _problems(config: "Trainer.Config", args: argparse.Namespace, out: str) -> list[Problem]:
    from let_plugin.teacher.stored.shards import ENCODINGS

    problems = []
    if args.encoding not in ENCODINGS:
        problems.append(Problem("--encoding", f"unknown encoding; {suggest(args.encoding, ENCODINGS)}", args.encoding))
    if not out:
        problems.append(Problem("--out", "give the folder to write to, here or as let.teacher.features"))
    if not config.let.enable or config.let.target != "teacher":
        key, value = ("let.enable", False) if not config.let.enable else ("let.target", config.let.target)
        problems.append(Problem(key, "there is no teacher in this run whose states could be exported", value))
    if config.let.control != "none":
        message = "a control is made of the teacher's own states when they are read; export without it"
        problems.append(Problem("let.control", message, config.let.control))
    return problems


def _settings(
    config: "Trainer.Config",
    info: Any,
    widths: dict[str, int],
    layers: list[int | str],
    encoding: str,
    batch_size: int,
    degree: int,
) -> dict[str, Any]:
    """All that the states depend on, for the manifest: JSON values, as they are when they have been read again."""
    from let_plugin.config import plan
    from let_plugin.teacher.stored import fingerprints
    from let_plugin.teacher.stored.features import rows_per_step

    options = dataclasses.asdict(config.let.teacher)
    settings = {
        "teacher": {
            "info": dataclasses.asdict(info),
            "options": {name: value for name, value in options.items() if name != "features"},
            "fingerprint": fingerprints.teacher(config.let.teacher),
            "dtype": str(plan.teacher_dtype(config)).removeprefix("torch."),
            "final_norm": config.let.teacher.final_norm,
        },
        "layers": layers,
        "widths": widths,
        "encoding": encoding,
        "tokenizer": fingerprints.tokenizer(config.hf_assets_path),
        "token_alignment": dataclasses.asdict(config.let.token_alignment),
        "loader": fingerprints.loader(config),
        "seq_len": config.training.seq_len,
        "batch_size": batch_size,
        "data_parallel_degree": degree,
        "rows_per_rank": plan.stop_step(config, degree) * rows_per_step(config, degree),
    }
    result: dict[str, Any] = json.loads(json.dumps(settings))
    return result


def _data_parallel_degree(config: "Trainer.Config", given: int | None, num_processes: int) -> int:
    """How many streams of rows the run will have. ConfigError if they cannot be shared by so many processes."""
    parallelism = config.parallelism
    stated = None
    if parallelism.data_parallel_shard_degree != -1:
        stated = parallelism.data_parallel_replicate_degree * parallelism.data_parallel_shard_degree
    degree = given or stated or num_processes
    message = ""
    if given is not None and given < 1:
        degree, message = given, "must be at least 1"
    elif stated and degree != stated:
        message = f"the configuration has {stated} data-parallel ranks (parallelism.data_parallel_*_degree)"
    elif degree % num_processes:
        message = f"{num_processes} processes cannot share {degree} data-parallel ranks evenly; start a divisor of them"
    if message:
        raise ConfigError(Problem("--data-parallel-degree", message, degree))
    return degree


def _alone(config: "Trainer.Config", degree: int) -> "Trainer.Config":
    """The configuration without what is the student's affair: data parallelism alone, and no stored states."""
    from torchtitan.config import ParallelismConfig

    config = copy.copy(config)
    config.let = copy.copy(config.let)
    config.let.teacher = dataclasses.replace(config.let.teacher, features="")
    config.parallelism = ParallelismConfig(data_parallel_shard_degree=degree)
    return config


def _differences(stored: Any, wanted: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two manifests differ."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            name
            for key in sorted({*stored, *wanted})
            for name in _differences(stored.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if stored == wanted else [prefix]


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


if __name__ == "__main__":
    main()
