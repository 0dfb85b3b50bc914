"""`let-bench converge`: methods x seeds on the same data in the same order, tuned on one split and read on another."""

import argparse
import math
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from let_plugin.bench import rows, tables
from let_plugin.bench.converge import stacking
from let_plugin.bench.converge.methods import WEIGHT, Method
from let_plugin.bench.converge.plan import Planner, Point
from let_plugin.bench.processes import Progress, RunFailedError, Running, slug
from let_plugin.bench.rows import BASELINE, CHOICE, CONVERGE, DIVERGED
from let_plugin.bench.runs import Run
from let_plugin.config import load as toml_config


def run(args: argparse.Namespace, options: Sequence[str], command: str) -> str:
    """Runs what is missing, and returns the table. ConfigError before anything is run.

    RunFailedError if a run fails; what was run before is in the result file.
    """
    suite = Suite(Planner(args, options), args, command)
    suite.tune()
    suite.finish()
    return tables.text([args.out], suite.id)


class Suite:
    """Runs what is not in the result file yet: each method with one seed, then with the next.

    What a killed suite has left in the file counts; a run that was broken off starts from zero.
    """

    def __init__(self, planner: Planner, args: argparse.Namespace, command: str) -> None:
        self._planner = planner
        self._args = args
        self._command = command
        self._origin = rows.provenance()
        self._common = toml_config.dump(planner.setup.load([]))
        self.id = rows.fingerprint(self._origin, self._common, args.processes)
        self._tuned = {method: planner.points(method) for method in planner.tuned()}
        self._chosen: dict[Method, Point] = {}
        self._progress = Progress(0)

    def tune(self) -> None:
        """Runs the grids, and chooses by the validation split."""
        seeds = self._args.tuning_seeds
        cells = [(method, point) for method, points in self._tuned.items() for point in points]
        runs = {(*cell, seed): self._planner.run(*cell, seed) for seed in seeds for cell in cells}
        self._run(list(runs.values()), "tuning", len(self._args.seeds) * len(self._planner.methods))
        found = self._found()
        for method, points in self._tuned.items():
            losses = [
                sum(_final_loss(found[self._id(runs[method, point, seed])]) for seed in seeds) / len(seeds)
                for point in points
            ]
            best = min(range(len(points)), key=losses.__getitem__)
            if not math.isfinite(losses[best]):
                raise RunFailedError(f"{method.name!r} has diverged at each point of the grid; take smaller values")
            self._chosen[method] = points[best]
            self._note_choice(method, points, losses, best)

    def finish(self) -> None:
        """Runs the methods with each seed."""
        cells = [(method, self._planner.chosen(method, self._chosen)) for method in self._planner.methods]
        runs = {self._id(own): own for seed in self._args.seeds for own in (self._planner.run(*c, seed) for c in cells)}
        found = self._found()
        for known in (found[id_] for id_ in runs if id_ in found):
            _refuse_without_baseline(known)
        self._run(list(runs.values()), "result")
        for own in (self._found()[id_] for id_ in runs):
            if own["role"] != "result":  # it was run to tune, and is a result as well
                rows.append(self._args.out, own | {"role": "result"})

    def _run(self, runs: Sequence[Run], role: str, num_later: int = 0) -> None:
        found = self._found()
        missing = [own for own in runs if self._id(own) not in found]
        if known := len(runs) - len(missing):
            print(f"{self._args.out} has {known} of {len(runs)} {role} runs already", flush=True)
        self._progress.num_left = len(missing) + num_later
        for own in missing:
            origin = rows.provenance()
            if rows.fingerprint(origin, self._common, self._args.processes) != self.id:
                raise RunFailedError("let_plugin has changed since the suite began: what is run now is other code")
            details = {"suite": self.id, "run": self._id(own), "role": role, "num_processes": self._args.processes}
            new = row(own, self._execute(own), origin, self._command, details)
            rows.append(self._args.out, new)
            _refuse_without_baseline(new)
            text = f"diverged, by step {new['values'][0]}"
            if new["kind"] == CONVERGE:
                text = f"validation {new['final_validation_loss']:.4f}, test {new['final_test_loss']:.4f}"
            self._progress.after(f"{role}, {own.label}, seed {own.details['seed']}: {text}")

    def _execute(self, own: Run) -> dict[str, Any]:
        """What was observed in a run, and its `preparation`. RunFailedError if it fails."""
        name = f"{slug(own.label)}-seed-{own.details['seed']}"
        scratch = (self._args.work_dir / "dump" / f"{name}-shallow").absolute()
        for left in (self._args.work_dir / "dump" / name, scratch):  # of a run that was broken off
            shutil.rmtree(left, ignore_errors=True)
        argv, preparation = own.argv, own.details["preparation"]
        if preparation["what"] == "shallow model":
            steps, blocks = str(self._args.gstack_steps), self._args.gstack_blocks
            saved = ["--checkpoint.enable", "--checkpoint.async_mode", "disabled", "--checkpoint.folder", "saved"]
            saved += ["--training.steps", steps, "--validator.freq", steps, "--dump_folder", str(scratch)]
            observed = self._observe([*argv, *saved], f"{name}-shallow", blocks)
            started = time.perf_counter()
            config = toml_config.load(self._args.config, list(argv[1:])).config
            stacking.grow(config, blocks, str(scratch / "saved" / f"step-{steps}"), scratch / "initial")
            seconds = observed["wall_seconds"] + time.perf_counter() - started
            preparation = preparation | {"seconds": seconds}
            initial = ["--checkpoint.initial-load-path", str(scratch / "initial")]
            argv = [*argv, "--checkpoint.enable", "--checkpoint.load-only", *initial]
        result = self._observe(argv, name)
        shutil.rmtree(scratch, ignore_errors=True)
        return result | {"preparation": preparation}

    def _observe(self, argv: Sequence[str], name: str, num_blocks: int | None = None) -> dict[str, Any]:
        request: dict[str, Any] = {
            "argv": argv,
            "settings": {},
            "num_blocks": num_blocks,
            "test": self._planner.setup.test,
        }
        out = self._args.work_dir / self.id / f"{name}.json"
        return Running.of(request, out, what=name, num_processes=self._args.processes).result()

    def _note_choice(self, method: Method, points: Sequence[Point], losses: Sequence[float], best: int) -> None:
        names = [_point_name(point) for point in points]
        finite = {name: loss for name, loss in zip(names, losses, strict=True) if math.isfinite(loss)}
        new = rows.row(
            CHOICE,
            command=self._command,
            config=self._common,
            seed=None,
            unit="nats/token",
            values=list(finite.values()),
            origin=self._origin,
            suite=self.id,
            method=method.asked or method.name,
            weights=list(finite),
            diverged=[name for name in names if name not in finite],
            chosen=names[best],
            at_end=at_end(points, best),
            tuning_seeds=list(self._args.tuning_seeds),
        )
        same = ("kind", "suite", "method", "weights", "values", "tuning_seeds")
        old = [row for row in rows.read(self._args.out) if row["kind"] == CHOICE and row["method"] == new["method"]]
        if not old or any(old[-1][key] != new[key] for key in same):
            rows.append(self._args.out, new)
        if new["at_end"]:
            print(f"{method.name}: the best {', '.join(new['at_end'])} is at the end of the grid", flush=True)

    def _id(self, own: Run) -> str:
        return own.id(self._origin, self._args.processes, shlex.join([self._args.test_dataset, self._args.test_path]))

    def _found(self) -> dict[str, dict[str, Any]]:
        return {row["run"]: row for row in rows.read(self._args.out) if row["kind"] in (CONVERGE, DIVERGED)}


def row(own: Run, result: Mapping[str, Any], origin: Any, command: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a run, of the kind DIVERGED if its loss was not finite at some evaluation.

    FLOPs and seconds of its curve include the preparation, its tokens do not.
    """
    curve, preparation = result["curve"], result["preparation"]
    losses = zip(curve["step"], curve["validation_loss"], curve["test_loss"], strict=True)
    diverged = [step for step, *values in losses if not all(map(math.isfinite, values))]
    if diverged:
        return own.row(DIVERGED, origin, command, "step", diverged[:1], **details)
    per_step, per_active_step = own.details["step_flops"], own.details["active_flops"]
    active = curve["active_steps"]
    full_curve = {
        "step": curve["step"],
        "tokens": [step * own.details["tokens_per_step"] for step in curve["step"]],
        "flops": [
            preparation["flops"] + per_step * step + per_active_step * num_active
            for step, num_active in zip(curve["step"], active, strict=True)
        ],
        "seconds": [(preparation["seconds"] or 0.0) + seconds for seconds in curve["seconds"]],
        "validation_loss": curve["validation_loss"],
        "test_loss": curve["test_loss"],
    }
    own = replace(own, details={**own.details, **result, "curve": full_curve})
    final = {f"final_{name}": full_curve[name][-1] for name in ("validation_loss", "test_loss")}
    values = [final["final_test_loss"]]
    return own.row(CONVERGE, origin, command, "nats/token", values, active_steps=active[-1], **final, **details)


def at_end(points: Sequence[Point], best: int) -> list[str]:
    """The keys whose best value is the smallest or the largest that was tried: the grid should go further there."""
    found = []
    for (key, value), *others in zip(points[best], *points, strict=True):
        try:
            values = {float(other) for _, other in others}
        except ValueError:
            continue  # names have no order
        if len(values) > 1 and float(value) in (min(values), max(values)):
            found.append(key)
    return found


def _point_name(point: Point) -> float | str:
    """The weight, if that is all that is tuned."""
    if [key for key, _ in point] == [WEIGHT]:
        return float(point[0][1])
    return ", ".join(f"{key} {value}" for key, value in point)


def _refuse_without_baseline(own: Mapping[str, Any]) -> None:
    if own["kind"] == DIVERGED and own["method"] == BASELINE:
        what = f"{BASELINE!r} has diverged with seed {own['seed']}"
        raise RunFailedError(f"{what}: there is nothing to compare with. Change the configuration or the seeds")


def _final_loss(own: Mapping[str, Any]) -> float:
    """On the validation split; infinite for a run that has diverged."""
    return math.inf if own["kind"] == DIVERGED else own["final_validation_loss"]
