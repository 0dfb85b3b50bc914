"""`let-bench converge`: methods x seeds on the same data in the same order, tuned on one split and read on another."""

import argparse
import fcntl
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from let_plugin.bench import rows, runs, tables
from let_plugin.bench.converge import observe, stacking
from let_plugin.bench.converge.methods import WEIGHT, Method
from let_plugin.bench.converge.plan import Planner, Point, settings_text
from let_plugin.bench.processes import RunFailedError, slug
from let_plugin.bench.rows import BASELINE, CHOICE, CONVERGE, DIVERGED
from let_plugin.bench.runs import Run
from let_plugin.config import load as toml_config

_POLL_SECONDS = 5.0  # while other processes make what is missing


def run(args: argparse.Namespace, options: Sequence[str], command: str) -> str:
    """Runs what is missing, and returns the table. ConfigError before any run, RunFailedError if one fails."""
    suite = Suite(Planner(args, options), args, command)
    suite.tune()
    suite.finish()
    return tables.text([args.out], suite.id)


class Suite(runs.Suite):
    """Runs what is not in the result file yet. A run that was broken off starts from zero, if it is not resumable.

    Several processes may do so at the same time: each takes a run that no other one has begun.
    """

    def __init__(self, planner: Planner, args: argparse.Namespace, command: str) -> None:
        self._common = toml_config.dump(planner.setup.load([]))
        super().__init__(args, command, self._common)
        self._planner = planner
        self._tuned = {method: planner.points(method) for method in planner.tuned()}
        self._chosen: dict[Method, Point] = {}

    def tune(self) -> None:
        """Runs the grids, and chooses by the validation split."""
        seeds = self._args.tuning_seeds
        cells = [(method, point) for method, points in self._tuned.items() for point in points]
        planned = {(*cell, seed): self._planner.run(*cell, seed) for seed in seeds for cell in cells}
        made = dict(zip(planned, self._run(list(planned.values()), "tuning"), strict=True))
        loss = {key: row.get("final_validation_loss", math.inf) for key, row in made.items()}  # infinite: it diverged
        for method, points in self._tuned.items():
            losses = [fmean(loss[method, point, seed] for seed in seeds) for point in points]
            best = min(range(len(points)), key=losses.__getitem__)
            if not math.isfinite(losses[best]):
                raise RunFailedError(f"{method.name!r} has diverged at each point of the grid; take smaller values")
            self._chosen[method] = points[best]
            self._note_choice(method, points, losses, best)

    def finish(self) -> None:
        """Runs all methods with one seed, then with the next."""
        cells = [(method, self._planner.chosen(method, self._chosen)) for method in self._planner.methods]
        planned = [self._planner.run(*cell, seed) for seed in self._args.seeds for cell in cells]
        self._run(planned, "result")

    def _run(self, planned: Sequence[Run], role: str) -> list[dict[str, Any]]:
        """The rows of all of them; runs those that the file does not have, and no other process is running."""
        ids, found = [self._id(own) for own in planned], self._found(role)
        progress = tqdm(total=len(ids), initial=sum(id_ in found for id_ in ids), desc=role)
        while True:
            for id_, own in zip(ids, planned, strict=True):
                if id_ not in found:
                    with self._claim(id_) as is_ours:
                        found = self._found(role)
                        if is_ours and id_ not in found:
                            found[id_] = self._make(own, role)
                progress.update(sum(id_ in found for id_ in ids) - progress.n)
                made = found.get(id_, {})
                if role == "result" and (made.get("kind"), made.get("method")) == (DIVERGED, BASELINE):
                    what = f"{BASELINE!r} has diverged with seed {made['seed']}: there is nothing to compare with"
                    raise RunFailedError(f"{what}. Change the configuration or the seeds")
            if progress.n == len(ids):
                return [found[id_] for id_ in ids]
            time.sleep(_POLL_SECONDS)

    def _found(self, role: str) -> dict[str, dict[str, Any]]:
        """The rows of the file by their runs. One that was run to tune is no result until it has a row as such."""
        own = [row for row in rows.read(self._args.out) if row.get("suite") == self.id and "run" in row]
        return {row["run"]: row for row in own if role in ("tuning", row["role"])}

    @contextmanager
    def _claim(self, what: str) -> Iterator[bool]:
        """Whether this process is the one to do it now. A process that is killed gives up its claims."""
        with (self._folder / f"{slug(what)}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _make(self, own: Run, role: str) -> dict[str, Any]:
        origin, id_ = self._origin_now(), self._id(own)
        if tuned := self._found("tuning").get(id_):  # a result as well
            rows.append(self._args.out, tuned | {"role": role})
            return tuned
        new = self._append(own, origin=origin, run=id_, role=role, **observed(own, self._execute(own)))
        text = f"diverged, by step {new['values'][0]}"
        if new["kind"] == CONVERGE:
            text = f"validation {new['final_validation_loss']:.4f}, test {new['final_test_loss']:.4f}"
        tqdm.write(f"{role}, {own.label}, seed {own.details['seed']}: {text}")
        return new

    def _execute(self, own: Run) -> dict[str, Any]:
        """What was observed in a run, and its `preparation`. RunFailedError if it fails."""
        name = f"{slug(own.label)}-seed-{own.details['seed']}"
        dump = (self._args.work_dir / "dump" / name).absolute()
        scratch, saved = dump / "shallow", dump / self._id(own)
        argv, preparation = own.argv, own.details["preparation"]
        grows = preparation["what"] == "shallow model"
        if observe.seen_before(saved) is None:  # nothing to go on from is left of a run that was broken off
            shutil.rmtree(dump, ignore_errors=True)
        if grows:
            seconds = self._grow(argv, scratch, f"{name}-shallow")
            preparation = preparation | {"seconds": seconds}
            initial = ["--checkpoint.initial-load-path", str(scratch / "initial")]
            argv = [*argv, "--checkpoint.enable", "--checkpoint.load-only", *initial]
        result = self._observe(argv, name, saved=str(saved) if self._args.resumable and not grows else None)
        for folder in (scratch, saved):
            shutil.rmtree(folder, ignore_errors=True)
        return result | {"preparation": preparation}

    def _grow(self, argv: Sequence[str], scratch: Path, name: str) -> float:
        """Trains the shallow model, and makes the first weights of the student out of it; returns the seconds."""
        steps, blocks, saved = str(self._args.gstack_steps), self._args.gstack_blocks, scratch / "saved"
        own = ["--training.steps", steps, "--validator.freq", steps, "--dump_folder", str(scratch)]
        observed = self._observe([*argv, *own], name, num_blocks=blocks, saved=str(saved))
        started = time.perf_counter()
        config = toml_config.load(self._args.config, list(argv[1:])).config
        stacking.grow(config, blocks, str(saved / f"step-{steps}"), scratch / "initial")
        return observed["curve"][-1]["seconds"] + time.perf_counter() - started

    def _observe(self, argv: Sequence[str], name: str, **adapted: Any) -> dict[str, Any]:
        return self._start(name, name, argv=argv, settings={}, test=self._planner.setup.test, **adapted).result()

    def _note_choice(self, method: Method, points: Sequence[Point], losses: Sequence[float], best: int) -> None:
        # The weight, if that is all that is tuned.
        names = [float(p[0][1]) if [key for key, _ in p] == [WEIGHT] else settings_text(p) for p in points]
        finite = {name: loss for name, loss in zip(names, losses, strict=True) if math.isfinite(loss)}
        said: dict[str, Any] = {
            "suite": self.id,
            **self._named,
            "method": method.asked or method.name,
            "weights": list(finite),
            "values": list(finite.values()),
            "diverged": [name for name in names if name not in finite],
            "chosen": names[best],
            "tuning_seeds": list(self._args.tuning_seeds),
        }
        with self._claim(f"choice-{said['method']}") as is_ours:
            old = [
                row for row in rows.read(self._args.out) if row["kind"] == CHOICE and row["method"] == said["method"]
            ]
            if is_ours and (not old or any(old[-1].get(key) != value for key, value in said.items())):
                said |= {"command": self._command, "config": self._common, "seed": None, "unit": "nats/token"}
                rows.append(self._args.out, rows.row(CHOICE, self._origin, **said))

    def _id(self, own: Run) -> str:
        """The same for the same run of the same code on the same device."""
        return rows.fingerprint(self._origin, asdict(own), self._args.processes, self._planner.setup.test)


def observed(own: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's row, of the kind DIVERGED if its loss was not finite at some evaluation.

    FLOPs and seconds of its curve include the preparation, its tokens do not.
    """
    curve, before, known = pd.DataFrame(result["curve"]), result["preparation"], own.details
    is_finite = np.isfinite(curve[["validation_loss", "test_loss"]]).all(axis=1)
    if not is_finite.all():
        return {"kind": DIVERGED, "unit": "step", "values": curve["step"][~is_finite].tolist()[:1]}
    active = curve.pop("active_steps")
    curve["tokens"] = curve["step"] * known["tokens_per_step"]
    curve["flops"] = before["flops"] + known["step_flops"] * curve["step"] + known["active_flops"] * active
    curve["seconds"] += before["seconds"] or 0.0
    last = curve.iloc[-1]
    final = {f"final_{name}": last[name] for name in ("validation_loss", "test_loss")}
    measured = {"unit": "nats/token", "values": [last["test_loss"]], "active_steps": int(active.iloc[-1])}
    return {"kind": CONVERGE, **result, "curve": curve.to_dict("list"), **final, **measured}
