"""States that `let-teacher export` has written: what they are of, whether they are a run's, and how a run reads them.

A folder holds `manifest.json` and the rows (see shards.py). The rows are read in the data loader's workers, if it has
any; they travel to the device as they are stored, and are decoded there.

Shape legend: B batch, L sequence, E teacher width: the sum over the layers that are asked for.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchtitan.trainer import Trainer

from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.teacher.base import StateProvider, States, TeacherInfo
from let_plugin.teacher.stored import fingerprints, shards
from let_plugin.teacher.stored.shards import FEATURES_KEY, MISSING, RowReader, decode, shard_paths, write_safely

MANIFEST = "manifest.json"
FORMAT = 2  # 1 had other settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an export is of, in JSON values."""

    settings: dict[str, Any]  # what it was asked for; a folder is of one such
    result: dict[str, Any] | None = None  # what came of it; None until it is complete

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, "settings": self.settings, "result": self.result}
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        write_safely(folder / MANIFEST, text.encode())

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """ConfigError if there is none, or it is not one that this version has written."""
        try:
            content = json.loads((folder / MANIFEST).read_text())
            if content["format"] == FORMAT:
                return Manifest(settings=dict(content["settings"]), result=content["result"])
            message = f"written in format {content['format']}, this version reads {FORMAT}: export again elsewhere"
        except FileNotFoundError:
            message = f"no {MANIFEST} there; `let-teacher export` makes such a folder"
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"its {MANIFEST} cannot be read ({error}): export again elsewhere"
        raise ConfigError(Problem(FEATURES_KEY, message, str(folder)))


class Features:
    """A complete export in a folder: its manifest has been read, its rows have not.

    ConfigError if it is not there, not complete or damaged.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(path)
        manifest = Manifest.read(self.folder)
        if manifest.result is None:
            message = "the export is not complete; run the same let-teacher export again, it goes on where it ended"
            raise ConfigError(Problem(FEATURES_KEY, message, path))
        self.settings = manifest.settings
        try:
            num_shards: int = manifest.result["num_shards"]
            self.num_rows: int = manifest.result["num_rows"]
            # Whether there may be tokens without a state.
            self.is_partial: bool = self.settings["run"]["let.token_alignment.enable"]
            info: dict[str, Any] = self.settings["teacher"]["info"]
            self.info = TeacherInfo(**info | {"block_params": tuple(info["block_params"])})
        except (KeyError, TypeError) as error:
            message = f"its {MANIFEST} lacks {error}: export again elsewhere"
            raise ConfigError(Problem(FEATURES_KEY, message, path)) from error
        if (found := len(shard_paths(self.folder))) != num_shards:
            message = f"there are {found} files of rows instead of {num_shards}; run the same let-teacher export again"
            raise ConfigError(Problem(FEATURES_KEY, message, path))

    def check(self, config: Trainer.Config, layers: Sequence[int | str], num_data_parallel: int) -> None:
        """ConfigError with every reason why these are not the states that a run needs, which aligns `layers`."""
        let, stored, folder = config.let.teacher, self.settings, str(self.folder)
        made = f"{FEATURES_KEY} = {folder!r} was made"
        problems = self._differences(config, layers, f"{made} with")
        if num_data_parallel != stored["data_parallel_degree"]:
            message = f"{made} for {stored['data_parallel_degree']} data-parallel ranks; run with as many"
            degree = f"--parallelism.data_parallel_shard_degree {num_data_parallel}"
            problems.append(Problem("parallelism", f"{message}, or export again with {degree}"))
        if missing := [layer for layer in layers if layer not in stored["layers"]]:
            message = f"has the states of the teacher's layers {stored['layers']}, not of {missing}; export again"
            problems.append(Problem(FEATURES_KEY, message, folder))
        key, named = ("let.teacher.path", let.path) if let.path else ("let.teacher.spec", let.spec)
        if (fingerprint := fingerprints.teacher(let)) not in ("", stored["teacher"]["fingerprint"]):
            message = f"{fingerprint} is not the teacher whose states are in {folder!r} ({self.info.description})"
            problems.append(Problem(key, message, named))
        stop_step, rows = plan.last_step(config, num_data_parallel), rows_per_step(config, num_data_parallel)
        if stop_step * rows > stored["rows_per_rank"]:
            steps = stored["rows_per_rank"] // rows
            message = f"has {steps:,} steps; the alignment lasts {stop_step:,}; set let.stop_step = {steps}"
            problems.append(Problem(FEATURES_KEY, f"{message}, or export again", folder))
        raise_if_any(problems)

    def _differences(self, config: Trainer.Config, layers: Sequence[int | str], made_with: str) -> list[Problem]:
        """Keys that decide what the states are, and are not as they were."""
        stored, wanted = self.settings["run"], fingerprints.run(config)
        irrelevant = set()
        if not config.let.token_alignment.enable:  # then it is as it was when the states were made
            irrelevant |= {key for key in stored if key.startswith("let.token_alignment.")}
        if self.info.num_layers - 1 not in layers:
            irrelevant.add("let.teacher.final_norm")
        if stored.get("dataloader.dataset") != wanted.get("dataloader.dataset"):
            irrelevant.add("dataloader.dataset_path")  # another dataset has another path
        problems = []
        for key in sorted({*stored, *wanted} - irrelevant):
            value, was = wanted.get(key), f"{made_with} {stored.get(key)!r}"
            if value == stored.get(key):
                continue
            if key == "hf_assets_path":  # the two are fingerprints
                value, was = config.hf_assets_path, f"not the tokenizer that {made_with}"
            problems.append(Problem(key, f"{was}; set that, or export again", value))
        return problems

    def describe(self, config: Trainer.Config, layers: Sequence[int | str]) -> str:
        """A line for people: how the states are stored, and how much a rank reads in a step."""
        size = self.bytes_per_token(layers)
        step = size * config.training.seq_len * config.training.local_batch_size
        encoding = self.settings["encoding"]
        return f"{self.folder}: {encoding}, {size:,} bytes per token, {step / 2**20:,.1f} MiB per local batch"

    def bytes_per_token(self, layers: Sequence[int | str]) -> int:
        encoding, widths = self.settings["encoding"], self.settings["widths"]
        return sum(shards.bytes_per_token(encoding, widths[str(layer)]) for layer in layers)


def rows_per_step(config: Trainer.Config, num_data_parallel: int) -> int:
    """Rows that one data-parallel rank reads in an optimizer step."""
    rows = config.training.global_batch_size
    return rows // num_data_parallel if rows > 0 else config.training.local_batch_size


class StoredStates(StateProvider):
    """Reads the states of these layers, in this order, in the teacher's `dtype`; no teacher is there."""

    def __init__(self, features: Features, layers: Sequence[int | str], *, dtype: torch.dtype) -> None:
        self._features = features
        self._layers = layers
        self._dtype = dtype
        self._columns = shards.ENCODINGS[features.settings["encoding"]]
        self.make_extras = RowReader(features.folder, [f"{layer}.{name}" for layer in layers for name in self._columns])

    def states(self, batch: Mapping[str, torch.Tensor], student_masks: Any = None) -> States:
        """ConfigError if a row of the batch is not stored."""
        if MISSING in batch:
            message = "a row of the training data is not stored there: the data, or their order, have become others"
            folder = str(self._features.folder)
            raise ConfigError(Problem(FEATURES_KEY, f"{message}; export again, or name the teacher instead", folder))
        columns = [{name: batch[f"{layer}.{name}"] for name in self._columns} for layer in self._layers]
        states = [decode(of_layer, self._dtype) for of_layer in columns]
        states_BLE = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        known_BL = states_BLE.ne(0).any(dim=-1) if self._features.is_partial else None
        return States(states_BLE, known_BL, 0)  # no teacher has run: the speed that is logged is 0
