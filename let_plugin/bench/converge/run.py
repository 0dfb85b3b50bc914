"""`let-bench converge`: methods x seeds on the same data in the same order, tuned on one split and read on another."""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from let_plugin.bench import rows, tables
from let_plugin.bench.converge.plan import Options, Planner
from let_plugin.bench.converge.runs import Run, execute, row
from let_plugin.bench.processes import Progress, RunFailedError
from let_plugin.bench.rows import BASELINE, CHOICE, CONVERGE, DIVERGED
from let_plugin.config import load as toml_config
from let_plugin.runtime import data


def run(config_file: Path, overrides: Sequence[str], options: Options, command: str) -> str:
    """Runs what is missing, and returns the table. The host is set up.

    Raises:
        ConfigError: Before anything is run.
        RunFailedError: If a run fails; what was run before is in the result file.
    """
    logger.setLevel(logging.ERROR)  # torchtitan's remarks on each of many configurations
    loaded = toml_config.load(config_file, list(overrides))
    data.register()
    os.environ["WORLD_SIZE"] = str(options.num_processes)  # of the runs, which the checks are for
    suite = Suite(Planner(loaded, options), options, command)
    suite.tune()
    return suite.finish()


class Suite:
    """Runs what is not in the result file yet, in turn: each method with one seed, then with the next.

    What a killed suite has left in the file counts; a run that was broken off starts from zero.
    """

    def __init__(self, planner: Planner, options: Options, command: str) -> None:
        self._planner = planner
        self._options = options
        self._command = command
        self._origin = rows.provenance()
        self.id = rows.fingerprint(self._origin, planner.text, options.num_processes)
        self._tuning = planner.tuning_runs()
        self._chosen: dict[str, float] = {}
        # Which weights will be chosen is not known yet; the runs are as long with any.
        some_weights = {method: weight for weight in options.weights[:1] for method in planner.tuned()}
        results = [(method, seed) for seed in options.seeds for method, _ in planner.cells(some_weights)]
        tuning = self._missing(self._tuning)
        self._results = [method for method, _ in results]
        self._progress = Progress([*(run.method for run in tuning), *self._results])

    def tune(self) -> None:
        """Runs the grid, and chooses by the validation split."""
        self._run(self._tuning, "tuning", self._results)
        found = self._found()
        for method in self._planner.tuned():
            runs = [run for run in self._tuning if run.method == method]
            losses = {
                weight: [_final_loss(found[self._id(run)]) for run in runs if run.weight == weight]
                for weight in self._options.weights
            }
            means = {weight: sum(own) / len(own) for weight, own in losses.items()}
            best = min(means, key=means.__getitem__)
            if not math.isfinite(means[best]):
                raise RunFailedError(f"{method!r} has diverged at each weight of the grid; take smaller ones")
            self._chosen[method] = best
            self._note_choice(method, means)

    def finish(self) -> str:
        """Runs the rest; returns the table."""
        cells = self._planner.cells(self._chosen)
        runs = [self._planner.plan(*cell, seed) for seed in self._options.seeds for cell in cells]
        found = self._found()
        _refuse_without_baseline(found[self._id(run)] for run in runs if self._id(run) in found)
        self._run(runs, "result", [])
        found = self._found()
        for run in runs:
            own = found[self._id(run)]
            if own["role"] != "result":  # it was run to tune, and is a result as well
                rows.append(self._options.out, own | {"role": "result"})
        return tables.text([self._options.out], self.id)

    def _run(self, runs: Sequence[Run], role: str, later: Sequence[str]) -> None:
        missing = self._missing(runs)
        if known := len(runs) - len(missing):
            print(f"{self._options.out} has {known} of {len(runs)} {role} runs already", flush=True)
        self._progress.expect([*(run.method for run in missing), *later])
        for run in missing:
            origin = rows.provenance()
            if rows.fingerprint(origin, self._planner.text, self._options.num_processes) != self.id:
                raise RunFailedError("let_plugin has changed since the suite began: what is run now is other code")
            result = execute(run, self._options.work / self.id, self._options.num_processes)
            details: dict[str, Any] = {"suite": self.id, "run": self._id(run), "role": role}
            details["num_processes"] = self._options.num_processes
            curve = result["curve"]
            losses = zip(curve["step"], curve["validation_loss"], curve["test_loss"], strict=True)
            step = next((step for step, *values in losses if not all(map(math.isfinite, values))), None)
            if step is not None:
                new = self._diverged_row(run, step, origin, details)
                text = f"diverged, by step {step}"
            else:
                new = row(run, result, origin, self._command, details)
                text = f"validation {new['final_validation_loss']:.4f}, test {new['final_test_loss']:.4f}"
            rows.append(self._options.out, new)
            _refuse_without_baseline([new])
            self._progress.after(f"{role}, {run.label}, seed {run.seed}: {text}")

    def _diverged_row(self, run: Run, step: int, origin: dict[str, Any], details: dict[str, Any]) -> dict[str, Any]:
        return rows.row(
            DIVERGED,
            command=self._command,
            config=run.config,
            seed=run.seed,
            unit="step",
            values=[step],
            origin=origin,
            label=run.label,
            method=run.method,
            weight=run.weight,
            **details,
        )

    def _note_choice(self, method: str, losses: Mapping[float, float]) -> None:
        finite = {weight: loss for weight, loss in losses.items() if math.isfinite(loss)}
        new = rows.row(
            CHOICE,
            command=self._command,
            config=self._planner.text,
            seed=None,
            unit="nats/token",
            values=list(finite.values()),
            origin=self._origin,
            suite=self.id,
            method=method,
            weights=list(finite),
            diverged=[weight for weight in losses if weight not in finite],
            chosen=self._chosen[method],
            tuning_seeds=list(self._options.tuning_seeds),
        )
        same = ("kind", "suite", "method", "weights", "values", "tuning_seeds")
        old = [row for row in rows.read(self._options.out) if row["kind"] == CHOICE and row["method"] == method]
        if not old or any(old[-1][key] != new[key] for key in same):
            rows.append(self._options.out, new)

    def _id(self, run: Run) -> str:
        return run.id(self._origin, self._options.num_processes)

    def _found(self) -> dict[str, dict[str, Any]]:
        return {row["run"]: row for row in rows.read(self._options.out) if row["kind"] in (CONVERGE, DIVERGED)}

    def _missing(self, runs: Sequence[Run]) -> list[Run]:
        found = self._found()
        return [run for run in runs if self._id(run) not in found]


def _refuse_without_baseline(found: Iterable[Mapping[str, Any]]) -> None:
    for own in found:
        if own["kind"] == DIVERGED and own["method"] == BASELINE:
            what = f"{BASELINE!r} has diverged with seed {own['seed']}"
            raise RunFailedError(f"{what}: there is nothing to compare with. Change the configuration or the seeds")


def _final_loss(row: Mapping[str, Any]) -> float:
    """On the validation split; infinite for a run that has diverged."""
    return math.inf if row["kind"] == DIVERGED else row["final_validation_loss"]
