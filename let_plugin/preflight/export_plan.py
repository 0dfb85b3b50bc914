"""What an export is to write, checked: which rows, which layers, how they are stored, and how much space that takes."""

import argparse
import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import ParallelismConfig
from torchtitan.trainer import Trainer

from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, suggest
from let_plugin.preflight import checks as preflight
from let_plugin.teacher.open import open_source
from let_plugin.teacher.stored import fingerprints
from let_plugin.teacher.stored.features import ENCODINGS, MANIFEST, PROJECTIONS, Manifest, make_encoding, rows_per_step
from let_plugin.teacher.stored.shards import KEY_BYTES, shard_paths

_SHARD_BYTES = 2**26  # what an interruption loses at most, of each process


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
    """

    config: Trainer.Config
    batch_size: int
    layers: list[int | str]
    settings: dict[str, Any]
    folder: Path
    num_processes: int

    @staticmethod
    def make(config: Trainer.Config, args: argparse.Namespace, num_processes: int) -> "Plan":
        """ConfigError if the run or the export is not as it should be. Reads no weights, writes nothing."""

        out = args.out or config.let.teacher.features
        degree = _data_parallel_degree(config, args.data_parallel_degree, num_processes)
        problems = _option_problems(args, out)
        if not config.let.enable or config.let.target != "teacher":
            key, value = ("let.enable", False) if not config.let.enable else ("let.target", config.let.target)
            problems.append(Problem(key, "there is no teacher in this run whose states could be exported", value))
        if config.let.control != "none":
            message = "a control is made of the teacher's own states when they are read; export without it"
            problems.append(Problem("let.control", message, config.let.control))
        if problems:
            raise ConfigError(problems)

        pipelined = config.parallelism.pipeline_parallel_degree > 1
        training = config.training
        batch_size = config.parallelism.pipeline_parallel_microbatch_size if pipelined else training.local_batch_size
        config = _alone(config, degree)
        preflight.run(config, degree)
        source = open_source(config.let.teacher)
        layers = plan.teacher_layers(plan.pairs(config, source.info.num_layers))
        widths = {str(layer): source.info.width(layer, config.let.teacher.final_norm) for layer in layers}
        if args.encoding in PROJECTIONS and args.width > min(widths.values()):
            raise ConfigError(
                Problem("--width", f"the teacher's states have {min(widths.values())} channels", args.width)
            )
        encoding: dict[str, Any] = {"name": args.encoding}
        if args.encoding in PROJECTIONS:
            encoding["width"] = args.width
            encoding |= {"fit_rows": args.fit_rows} if args.encoding == "pca" else {"seed": args.seed}
        seq_len = training.seq_len
        per_token = sum(bytes_per_token(args.encoding, width, args.width) for width in widths.values())
        options = dataclasses.asdict(config.let.teacher)
        settings = {
            "teacher": {
                "info": dataclasses.asdict(source.info),
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
            "seq_len": seq_len,
            "batch_size": batch_size,
            "data_parallel_degree": degree,
            "rows_per_rank": plan.stop_step(config, degree) * rows_per_step(config, degree),
            "rows_per_shard": args.rows_per_shard or max(1, _SHARD_BYTES // (per_token * seq_len)),
        }
        return Plan(
            config=config,
            batch_size=batch_size,
            layers=layers,
            settings=_as_json(settings),
            folder=Path(out),
            num_processes=num_processes,
        )

    @property
    def num_rows(self) -> int:
        return self.settings["rows_per_rank"] * self.settings["data_parallel_degree"]

    @property
    def num_bytes(self) -> int:
        """What is stored of `num_rows` different rows, in bytes; headers and a projection's basis not counted."""
        return self._size(self.settings["encoding"]["name"])

    def report(self) -> str:
        """For people: how much there is to write, in each encoding."""
        settings, encoding = self.settings, self.settings["encoding"]["name"]
        info, widths = settings["teacher"]["info"], settings["widths"]
        tokens = self.num_rows * settings["seq_len"]
        lines = [
            "LET export",
            f"  teacher    {info['description']}, {settings['teacher']['dtype']}",
            f"  layers     {', '.join(f'{layer} (width {width})' for layer, width in widths.items())}",
            f"  rows       {self.num_rows:,} of {settings['seq_len']:,} tokens, {tokens:,} tokens in all: "
            f"{settings['rows_per_rank']:,} rows of each of {settings['data_parallel_degree']} data-parallel ranks",
        ]
        for name in ENCODINGS:
            kept = settings["encoding"].get("width")
            if name in PROJECTIONS and kept is None:
                kept = max(1, min(widths.values()) // 4)
            per_token = sum(bytes_per_token(name, width, kept) for width in widths.values())
            label = f"{name}, {kept} channels" if name in PROJECTIONS else name
            chosen = "  <- chosen" if name == encoding else ""
            lines.append(f"  storage    {_size(self._size(name, kept)):>10}  {per_token:6,} B/token  {label}{chosen}")
        lines.append(f"  free       {_size(shutil.disk_usage(_existing(self.folder)).free):>10}  at {self.folder}")
        return "\n".join(lines)

    def check_folder(self) -> None:
        """ConfigError if the folder has something else in it, a complete export, or not enough space."""

        value = str(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(Problem("--out", "a file; give a folder", value))
        stored = 0
        if (self.folder / MANIFEST).exists():
            manifest = Manifest.read(self.folder)
            names = _differences(manifest.settings, self.settings)
            if names:
                message = f"holds an export of other settings ({', '.join(names)}); give another folder"
                raise ConfigError(Problem("--out", message, value))
            if manifest.result is not None:
                raise ConfigError(Problem("--out", "holds this export already, and it is complete", value))
            stored = sum(path.stat().st_size for path in shard_paths(self.folder))
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConfigError(Problem("--out", "is not empty and holds no export; give another folder", value))
        existing = _existing(self.folder)
        if not os.access(existing, os.W_OK):
            raise ConfigError(Problem("--out", f"{existing} is not writable; give another folder", value))
        free = shutil.disk_usage(existing).free
        if self.num_bytes - stored > free:
            message = f"needs {_size(self.num_bytes - stored)}, and {_size(free)} are free; see --encoding, and --check"
            raise ConfigError(Problem("--out", message, value))

    def _size(self, encoding: str, kept: int | None = None) -> int:

        kept = kept or self.settings["encoding"].get("width")
        per_token = sum(bytes_per_token(encoding, width, kept) for width in self.settings["widths"].values())
        return self.num_rows * (per_token * self.settings["seq_len"] + KEY_BYTES)


def bytes_per_token(encoding: str, width: int, kept: int | None) -> int:
    """What one layer's state takes.

    Args:
        encoding: Name of the encoding.
        width: E of the layer.
        kept: W, for a projection.
    """

    settings = {"encoding": {"name": encoding}, "widths": {"": width}}
    bases = {"": torch.empty(width, kept or 1, device="meta")} if encoding in PROJECTIONS else {}
    return make_encoding(settings, "", bases).bytes_per_token


def _option_problems(args: argparse.Namespace, out: str) -> list[Problem]:
    problems = []
    if args.encoding not in ENCODINGS:
        message = f"unknown encoding; {suggest(args.encoding, ENCODINGS)}"
        problems.append(Problem("--encoding", message, args.encoding))
    if not out:
        problems.append(Problem("--out", "give the folder to write to, here or as let.teacher.features"))
    if args.encoding in PROJECTIONS and args.width is None:
        problems.append(Problem("--width", f"give the number of channels that {args.encoding} is to keep"))
    for name in ("width", "fit_rows", "rows_per_shard"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(Problem(f"--{name.replace('_', '-')}", "must be at least 1", value))
    if args.encoding not in PROJECTIONS and args.width is not None:
        problems.append(Problem("--width", f"is for pca and random; {args.encoding} keeps all channels", args.width))
    return problems


def _data_parallel_degree(config: Trainer.Config, given: int | None, num_processes: int) -> int:
    """How many streams of rows the run will have. ConfigError if they cannot be shared by so many processes."""
    parallelism = config.parallelism
    stated = None
    if parallelism.data_parallel_shard_degree != -1:
        stated = parallelism.data_parallel_replicate_degree * parallelism.data_parallel_shard_degree
    degree = given or stated or num_processes
    if given is not None and given < 1:
        raise ConfigError(Problem("--data-parallel-degree", "must be at least 1", given))
    if given and stated and given != stated:
        message = f"the configuration has {stated} data-parallel ranks (parallelism.data_parallel_*_degree)"
        raise ConfigError(Problem("--data-parallel-degree", message, given))
    if degree % num_processes:
        message = f"{num_processes} processes cannot share {degree} data-parallel ranks evenly; start a divisor of them"
        raise ConfigError(Problem("--data-parallel-degree", message, degree))
    return degree


def _alone(config: Trainer.Config, degree: int) -> Trainer.Config:
    """The configuration without what is the student's affair: data parallelism alone, and no stored states."""

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


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """As they are when they have been written and read."""

    return json.loads(json.dumps(settings))


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
