"""`let-bench throughput`: what LET costs in tokens/s and memory, beside the bounds, for a user's configuration."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.bench import tables
from let_plugin.bench.processes import launch_problems
from let_plugin.bench.throughput import cases, random_teacher, stored_states, suite
from let_plugin.bench.throughput.cases import CASES, PLAIN, Steps, Variant
from let_plugin.bench.throughput.costs import active_cost
from let_plugin.config import load as toml_config
from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, lookup
from let_plugin.config.load import Loaded
from let_plugin.preflight import checks as preflight
from let_plugin.preflight.report import Cost, Student
from let_plugin.runtime import data

_TURN_SECONDS = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the command line.

    Attributes:
        cases: Names of cases, beside the plain one.
        pairs: How often each is measured.
        steps: Of a run.
        num_processes: Of a run.
        teacher_shares: Sizes of random teachers, as shares of the student's; none: the configured teacher.
        local_batch_sizes: None: the configuration's.
        seq_lens: None: the configuration's.
        out: Result file.
        work: Folder for logs, and for the weights of random teachers.
        profile: Also say where the overhead goes.
        interleave: The cases make their steps in turn, instead of one run after the other.
    """

    cases: Sequence[str]
    pairs: int
    steps: Steps
    num_processes: int
    teacher_shares: Sequence[float]
    local_batch_sizes: Sequence[int]
    seq_lens: Sequence[int]
    out: Path
    work: Path
    profile: bool
    interleave: bool

    def check(self) -> None:
        """ConfigError with all that is wrong."""
        problems = []
        # Without a spread there is no interval.
        for name, value, minimum in (
            ("--pairs", self.pairs, 2),
            ("--steps", self.steps.measured, 2),
            ("--processes", self.num_processes, 1),
        ):
            if value < minimum:
                problems.append(Problem(name, f"must be at least {minimum}", value))
        lengths = (("--batch-sizes", self.local_batch_sizes), ("--seq-lens", self.seq_lens))
        for name, sizes in lengths:
            problems += [Problem(name, "must be at least 1", size) for size in sizes if size < 1]
        shares: tuple[str, Sequence[float]] = ("--teacher-share", [100 * share for share in self.teacher_shares])
        for name, given in (shares, *lengths):
            problems += [Problem(name, "given twice", s) for s in dict.fromkeys(given) if given.count(s) > 1]
        problems += [
            Problem("--teacher-share", "must be more than 0 and at most 100, in percent", 100 * share)
            for share in self.teacher_shares
            if not 0 < share <= 1
        ]
        for name in self.cases:
            try:
                lookup(CASES.get, name, key="--cases")
            except ConfigError as error:
                problems += error.problems
        problems += launch_problems(self.out, self.work)
        if problems:
            raise ConfigError(problems)


def run(config_file: Path, overrides: Sequence[str], options: Options, command: str) -> str:
    """Measures, and returns the table. The host is set up.

    Raises:
        ConfigError: Before anything is measured.
        RunFailedError: See `suite.measure`.
    """
    logger.setLevel(logging.ERROR)  # torchtitan's remarks on each of many configurations
    loaded = toml_config.load(config_file, list(overrides))
    data.register()
    os.environ["WORLD_SIZE"] = str(options.num_processes)  # of the runs, which the checks are for
    runs = plan_runs(loaded, options)
    name = suite.measure(
        runs,
        pairs=options.pairs,
        num_processes=options.num_processes,
        out=options.out,
        work=options.work / "runs",
        command=command,
        profile=options.profile,
        interleave=options.interleave,
    )
    return tables.text([options.out], name)


def plan_runs(loaded: Loaded, options: Options) -> list[suite.Run]:
    """The checked runs of a round. ConfigError lists all that is wrong with any of them.

    Writes the weights of random teachers, once the plain run is known to be right, and the states that a case reads,
    once all is known to be.
    """
    base = loaded.config
    teachers: list[Any] = [(None, None)]
    batches = list(options.local_batch_sizes) or [base.training.local_batch_size]
    lengths = list(options.seq_lens) or [base.training.seq_len]

    def configured(variant: Variant, states: str = "") -> Trainer.Config:
        folder = options.work / "teachers"
        weights = "" if variant.teacher is None else str(folder / variant.teacher.name)
        dump_folder = str(options.work / "dump")
        config = cases.configure(base, variant, options.steps, dump_folder=dump_folder, weights=weights, states=states)
        if options.interleave:  # a process waits for its turn in a collective, while others compile
            config.comm.init_timeout_seconds = config.comm.train_timeout_seconds = _TURN_SECONDS
        return config

    def text(config: Trainer.Config) -> str:
        return toml_config.dump(replace(loaded, config=config))

    def checked(variants: Sequence[Variant]) -> None:
        problems: list[Problem] = []
        for variant in variants:
            try:
                replace(loaded, config=configured(variant)).apply(preflight.run)
            except ConfigError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise ConfigError(problems)

    def matrix() -> list[Variant]:
        return cases.matrix(options.cases, teachers=teachers, local_batch_sizes=batches, seq_lens=lengths)

    checked([variant for variant in matrix() if variant.case == PLAIN])
    dims = ParallelDims.from_config(base.parallelism, options.num_processes)
    stop_step = plan.stop_step(base, dims.dp_replicate * dims.dp_shard)
    if options.teacher_shares:
        assert base.model_spec is not None
        student, vocab_size = Student(base), base.model_spec.model.vocab_size
        teachers = [(s, random_teacher.of_share(student, s, vocab_size)) for s in options.teacher_shares]
        for _, teacher in teachers:
            teacher.register()
            teacher.write(options.work / "teachers")
    variants = matrix()
    checked(variants)

    runs = []
    for variant in variants:
        config = configured(variant)
        case = lookup(CASES.get, variant.case, key="--cases")
        if case.reads_states:
            folder = stored_states.make(
                text(config),
                variant.teacher,
                label=variant.label,
                data_parallel_degree=dims.dp_replicate * dims.dp_shard,
                work=options.work / "states",
            )
            config = configured(variant, str(folder))
        student = Student(config)
        costs = active_cost(config, student, dims) if case.has_teacher else Cost(0, 0.0, {})
        held = sum(size for name, size in costs.memory.items() if name.startswith(("teacher", "gradient")))
        runs.append(
            suite.Run(
                label=variant.label,
                config=text(config),
                seed=config.debug.seed,
                warmup=options.steps.warmup,
                total=options.steps.total,
                is_active=case.is_active,
                teacher=None if variant.teacher is None else variant.teacher.as_dict(),
                details={
                    "case": variant.case,
                    "baseline": cases.baseline(variant, variants).label,
                    "local_batch_size": variant.local_batch_size,
                    "seq_len": variant.seq_len,
                    # Of what is multiplied: N_T and N_S.
                    "num_teacher_params": costs.num_teacher_params,
                    "num_student_params": student.num_matmul_params,
                    "flop_bound": costs.overhead if case.is_active else 0.0,
                    "memory_bound_bytes": held if case.is_active else 0,
                    "run_steps": base.training.steps,
                    "stop_step": base.training.steps if case.is_throughout else stop_step,
                },
            )
        )
    return runs
