"""What an export is to write, checked: which rows, which layers, and how much space that takes."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from torchtitan.config import ParallelismConfig
from torchtitan.trainer import Trainer

from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.preflight import checks as preflight
from let_plugin.preflight.report import mib
from let_plugin.teacher.base import TeacherInfo
from let_plugin.teacher.open import open_source
from let_plugin.teacher.stored import fingerprints
from let_plugin.teacher.stored.features import MANIFEST, Manifest, rows_per_step
from let_plugin.teacher.stored.shards import KEY_BYTES, bytes_per_token, shard_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be exported."""

    config: Trainer.Config  # of the run, with the teacher in place of stored states and data parallelism alone
    settings: dict[str, Any]  # of the manifest
    folder: Path

    @staticmethod
    def make(config: Trainer.Config, args: argparse.Namespace, num_processes: int) -> "Plan":
        """ConfigError if the run or the export is not as it should be. Reads no weights, writes nothing."""
        out = args.out or config.let.teacher.features
        # As many streams of rows as the run will have data-parallel ranks, or else as the export has processes.
        parallelism, degree = config.parallelism, num_processes
        if parallelism.data_parallel_shard_degree != -1:
            degree = parallelism.data_parallel_replicate_degree * parallelism.data_parallel_shard_degree
        problems = _problems(config, args, out)
        if degree < 1 or degree % num_processes:
            message = f"data-parallel ranks: must be a multiple of the processes of the export, {num_processes}"
            problems.append(Problem("parallelism.data_parallel_shard_degree", message, degree))
        raise_if_any(problems)
        batch_size = plan.microbatch_rows(config)
        teacher = dataclasses.replace(config.let.teacher, features="")
        config = dataclasses.replace(
            config,
            let=dataclasses.replace(config.let, teacher=teacher),
            parallelism=ParallelismConfig(data_parallel_shard_degree=degree),
        )
        preflight.run(config, degree)
        settings = _settings(config, open_source(teacher).info, args.encoding, batch_size, degree)
        return Plan(config=config, settings=settings, folder=Path(out))

    @property
    def bytes_per_row(self) -> int:
        """What the states of a row take."""
        encoding, widths = self.settings["encoding"], self.settings["widths"].values()
        return sum(bytes_per_token(encoding, width) for width in widths) * self.settings["seq_len"]

    @property
    def num_rows(self) -> int:
        return self.settings["rows_per_rank"] * self.settings["data_parallel_degree"]

    @property
    def num_bytes(self) -> int:
        """What is stored of `num_rows` different rows; headers not counted."""
        return self.num_rows * (self.bytes_per_row + KEY_BYTES)

    def report(self) -> str:
        """For people: how much there is to write."""
        settings, widths = self.settings, self.settings["widths"]
        tokens, per_token = self.num_rows * settings["seq_len"], self.bytes_per_row // settings["seq_len"]
        return "\n".join(
            [
                "LET export",
                f"  teacher    {settings['teacher']['info']['description']}, {settings['run']['let.teacher.dtype']}",
                f"  layers     {', '.join(f'{layer} (width {width})' for layer, width in widths.items())}",
                f"  rows       {self.num_rows:,} of {settings['seq_len']:,} tokens, {tokens:,} tokens in all: "
                f"{settings['rows_per_rank']:,} rows of each of {settings['data_parallel_degree']} data-parallel ranks",
                f"  storage    {mib(self.num_bytes)}: {per_token:,} B/token, {settings['encoding']}",
                f"  free       {mib(self._num_free)} at {self.folder}",
            ]
        )

    @property
    def _num_free(self) -> int:
        return shutil.disk_usage(preflight.existing_parent(self.folder)).free

    def check_folder(self) -> None:
        """ConfigError if the folder has something else in it, an export and all of its files, or not enough space."""
        preflight.check_writable("--out", str(self.folder))
        num_stored, message = 0, ""
        if (self.folder / MANIFEST).exists():
            manifest, paths = Manifest.read(self.folder), shard_paths(self.folder)
            num_stored = sum(path.stat().st_size for path in paths)
            if names := [name for name, value in self.settings.items() if manifest.settings.get(name) != value]:
                message = f"holds an export of other settings ({', '.join(names)}); give another folder"
            elif manifest.result is not None and len(paths) == manifest.result.get("num_shards"):
                message = "holds this export already, and it is complete"
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            message = "is not empty and holds no export; give another folder"
        if not message and (needed := self.num_bytes - num_stored) > self._num_free:
            message = f"needs {mib(needed)}, and {mib(self._num_free)} are free; see --encoding, and --check"
        if message:
            raise ConfigError(Problem("--out", message, str(self.folder)))


def _problems(config: Trainer.Config, args: argparse.Namespace, out: str) -> list[Problem]:
    problems = []
    if not out:
        problems.append(Problem("--out", "give the folder to write to, here or as let.teacher.features"))
    if not config.let.enable or not plan.teacher_terms(config.let):
        key, value = ("let.enable", False) if not config.let.enable else ("let.signal", "labels")
        problems.append(Problem(key, "there is no teacher in this run whose states could be exported", value))
    if config.let.control != "none":
        message = "a control is made of the teacher's own states when they are read; export without it"
        problems.append(Problem("let.control", message, config.let.control))
    return problems


def _settings(config: Trainer.Config, info: TeacherInfo, encoding: str, batch_size: int, degree: int) -> dict[str, Any]:
    """All that the states depend on, for the manifest: JSON values, as they are when they have been read again."""
    layers = plan.all_teacher_layers(config, info.num_layers)
    options = dataclasses.asdict(config.let.teacher)
    del options["features"]
    settings = {
        "teacher": {
            "info": dataclasses.asdict(info),
            "options": options,
            "fingerprint": fingerprints.teacher(config.let.teacher),
        },
        "run": fingerprints.run(config),
        "layers": layers,
        "widths": {str(layer): info.width(layer, config.let.teacher.final_norm) for layer in layers},
        "encoding": encoding,
        "seq_len": config.training.seq_len,
        "batch_size": batch_size,
        "data_parallel_degree": degree,
        "rows_per_rank": plan.last_step(config, degree) * rows_per_step(config, degree),
    }
    return dict(json.loads(json.dumps(settings)))
