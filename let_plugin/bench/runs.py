"""The runs of a suite: a user's TOML file and options, with those of a case or a method after them."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.bench import child, rows
from let_plugin.bench.processes import RunFailedError, Running
from let_plugin.config import load as toml_config
from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.config.load import Loaded
from let_plugin.preflight import checks as preflight
from let_plugin.preflight.report import Cost, Student, cost
from let_plugin.teacher.open import open_source

# Switches off what disturbs a measurement, or writes or reads what another run does not.
QUIET = (
    *("--checkpoint.no-enable", "--debug.no-enable-structured-logging"),
    *("--metrics.no-enable-tensorboard", "--metrics.no-enable-wandb"),
    *("--profiler.no-enable-profiling", "--profiler.no-enable-memory-snapshot"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a suite."""

    label: str
    argv: Sequence[str]  # of let-train
    config: str  # the full effective configuration, as TOML
    settings: Mapping[str, Any]  # of the class that measures it
    details: Mapping[str, Any]  # what its rows say besides


class Suite:
    """Runs whose rows go into a file. What a killed suite has left there counts.

    `args` and `command` are the command line, parsed and as text; `same` is what else must be the same, as JSON, for
    rows to be compared: it, and the code, versions and device, make the suite's `id`.
    """

    def __init__(self, args: argparse.Namespace, command: str, *same: Any) -> None:
        self._args, self._command = args, command
        self._named = {"name": args.name} if args.name else {}
        self._same = [*same, args.processes]
        self._origin = rows.provenance()
        self.id = rows.fingerprint(self._origin, *self._same)
        self._folder = args.work_dir / self.id
        self._folder.mkdir(parents=True, exist_ok=True)

    def _origin_now(self) -> dict[str, Any]:
        """Where the next row comes from. RunFailedError if the package has changed since the suite began."""
        origin = rows.provenance()
        if rows.fingerprint(origin, *self._same) != self.id:
            raise RunFailedError("let_plugin has changed since the suite began: what is run now is other code")
        return origin

    def _append(self, planned: Run, kind: str, origin: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        """Adds the row of a run to the file, and returns it."""
        own = {"label": planned.label, "let_train": rows.command_line("let-train", planned.argv)}
        own |= {"suite": self.id, "num_processes": self._args.processes, "command": self._command, **self._named}
        new = rows.row(kind, origin, config=planned.config, **{**own, **planned.details, **fields})
        rows.append(self._args.out, new)
        return new

    def _start(self, name: str, what: str, **request: Any) -> Running:
        """A run of let-train that is measured; for `request` see `child`."""
        out = self._folder / f"{name}.json"
        file = out.with_suffix(".request.json")
        file.write_text(json.dumps({"out": str(out), **request}))
        return Running("let_plugin.bench.child", [str(file)], out, what=what, num_processes=self._args.processes)


class Setup:
    """What all runs of a suite have in common: a TOML file, options of let-train, and the processes of each run.

    `test` is (dataset, path) of a test split to evaluate as well, or None. The host is set up.
    """

    def __init__(self, toml: Path, options: Sequence[str], num_processes: int, test: Sequence[str] | None = None):
        self._toml, self._options, self._num_processes, self.test = toml, options, num_processes, test
        os.environ["WORLD_SIZE"] = str(num_processes)  # of the runs, which the checks are for

    def dims(self) -> ParallelDims:
        """The parallel dimensions of the runs, once `check` has passed."""
        return ParallelDims.from_config(self.load([]).config.parallelism, self._num_processes)

    def argv(self, options: Sequence[str]) -> list[str]:
        """The arguments of let-train for a run with more options. A later one overrides an earlier one."""
        return [str(self._toml), *self._options, *options]

    def load(self, options: Sequence[str], num_blocks: int | None = None) -> Loaded:
        """The configuration of such a run. ConfigError for mistakes in it."""
        loaded = toml_config.load(self._toml, self.argv(options)[1:])
        child.adapt(loaded.config, num_blocks, self.test)
        return loaded

    def check(self, variants: Sequence[Sequence[str]]) -> None:
        """Checks runs with these options, each as let-train does. ConfigError lists all that is wrong with any."""
        problems: list[Problem] = []
        for options in variants:
            try:
                loaded = toml_config.resolve(toml_config.read(self.argv(options)))
                child.adapt(loaded.config, None, self.test)
                loaded.apply(preflight.run)
            except ConfigError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        raise_if_any(problems)

    def run(self, label: str, options: Sequence[str], **fields: Any) -> Run:
        """A `Run`, of a configuration that has been checked."""
        config = toml_config.dump(self.load(options))
        return Run(label=label, argv=tuple(self.argv(options)), config=config, **fields)


def active_cost(config: Trainer.Config, student: Student, dims: ParallelDims) -> Cost:
    """What a step costs more while the teacher is there, or what takes its place; zero without LET."""
    if not config.let.enable:
        return Cost(0, 0.0, 0.0, {})
    terms = plan.terms(config.let)
    source = open_source(config.let.teacher) if plan.teacher_terms(config.let) else None
    depth = source.info.num_layers if source else None
    return cost(config, student, source, [(term, plan.pairs(config, term, depth)) for term in terms], dims)
