"""`let-bench throughput`: what LET costs in tokens/s and memory, beside the bounds, for a user's configuration.

A round measures every variant once (A B C, A B C, ...), each in a process of its own, so that what is compared is close
in time. A round that was broken off is measured again, under a new number.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from tqdm import tqdm

from let_plugin.bench import export_hf, rows, runs, tables
from let_plugin.bench.converge.methods import METHODS
from let_plugin.bench.processes import Running, slug
from let_plugin.bench.rows import PROFILE, THROUGHPUT
from let_plugin.bench.runs import QUIET, Run, Setup, active_cost
from let_plugin.bench.throughput.turns import take_turns
from let_plugin.config import plan
from let_plugin.preflight.report import Student
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.base import keep_rng_state

PLAIN = "plain"

# Steps before the measured ones, and those of them with a teacher in a run that stops it. They compile, and fill caches
# and the optimizer's state. All cases measure the same steps, so the same batches.
ACTIVE_STEPS, WARMUP_STEPS = 2, 4


@dataclass(frozen=True)
class Case:
    """Something to measure: options of let-train, beside those of all cases."""

    options: tuple[str, ...] = ()
    is_active: bool = False  # the teacher is there in the measured steps; a run where it is not so is an error
    has_teacher: bool = True  # it runs with LET, and once for each size of teacher


CASES = {
    PLAIN: Case(has_teacher=False),
    "control": Case(has_teacher=False),
    "active": Case(is_active=True),
    "rows": Case(("--let.teacher.rows", "0.25"), is_active=True),
    "stopped": Case(),
    "rkd": Case((*METHODS["rkd"].defaults, *METHODS["rkd"].options), is_active=True),
}


def case_options(case: Case, teacher: Path | None, args: argparse.Namespace, num_terms: int = 0) -> list[str]:
    """The options of let-train for a case. `teacher`: folder of a random teacher; None: the configured one.

    `num_terms`: how many `let.terms` the configuration has.
    """
    total = WARMUP_STEPS + args.steps
    found = [*QUIET, "--validator.no-enable", "--dump_folder", str(args.work_dir / "dump")]
    # The first step is logged, which nobody measures, and then none.
    found += ["--training.steps", str(total), "--metrics.log_freq", str(total + 1)]
    if args.interleave:  # a process waits for its turn in a collective while others compile
        found += ["--comm.init-timeout-seconds", "86400", "--comm.train-timeout-seconds", "86400"]
    if not case.has_teacher:
        return [*found, "--let.no-enable"]
    found.append("--let.enable")
    if teacher is not None:
        found += ["--let.teacher.path", str(teacher), "--let.teacher.spec", "", "--let.teacher.features", ""]
        found += ["--let.teacher.tokenizer_path", "", "--let.teacher.no-check-vocabulary"]
        found += ["--let.teacher.final-norm", "--let.teacher.no-center", "--let.token-alignment.no-enable"]
    found += case.options
    keys = [f"--let.terms.{i}" for i in range(num_terms)] or ["--let"]
    if num_terms and case is CASES["rkd"]:
        keys, found = ["--let"], [*found, "--let.terms", "[]"]
    for key in keys:
        found += [f"{key}.warmup-steps", "0", f"{key}.adaptive-stop.criterion", "none", f"{key}.stop-tokens", "None"]
        found += [f"{key}.stop-fraction", "None", f"{key}.stop-step", str(total if case.is_active else ACTIVE_STEPS)]
    return found


def run(args: argparse.Namespace, options: Sequence[str], command: str) -> str:
    """Measures what is missing, and returns the table. ConfigError before any run, RunFailedError if one fails."""
    suite = Suite(plan_runs(args, options), args, command)
    suite.measure()
    return tables.text([args.out], suite.id)


def plan_runs(args: argparse.Namespace, options: Sequence[str]) -> list[Run]:
    """The checked runs of a round, the plain one first. ConfigError lists all that is wrong with any of them.

    Writes the weights of random teachers once the plain run has passed its checks.
    """
    setup = Setup(args.config, options, args.processes)
    setup.check([case_options(CASES[PLAIN], None, args)])
    base: Any = setup.load([]).config
    teachers: dict[float | None, Path | None] = {}  # by their share of the student's size; None: the configured one
    for share in args.teacher_share:
        size = teacher_shape(Student(base), share / 100)
        folder = args.work_dir / "teachers"
        teachers[share / 100] = write_teacher(size, base.model_spec.model.vocab_size, folder)
    cells = [
        (name, share, case_options(CASES[name], teacher, args, len(base.let.terms)))
        for name in dict.fromkeys([PLAIN, *args.cases])
        for share, teacher in ((teachers if CASES[name].has_teacher else {}) or {None: None}).items()
    ]
    setup.check([own for *_, own in cells])
    dims = setup.dims()
    # The stop of a whole run; LET may be off in the configuration, but not what it says of the stop.
    stop_step = plan.last_step(base, dims.dp_replicate * dims.dp_shard)
    planned = []
    for name, share, own in cells:
        case, config = CASES[name], setup.load(own).config
        student = Student(config)
        costs = active_cost(config, student, dims)
        held = sum(size for what, size in costs.memory.items() if what.startswith(("teacher", "gradient")))
        details = {
            "case": name,
            "teacher_share": share,
            "baseline": PLAIN,
            "seed": config.debug.seed,
            "num_teacher_params": costs.num_teacher_params,  # that are multiplied
            "num_student_params": student.num_matmul_params,
            "flop_bound": costs.overhead if case.is_active else 0.0,
            "memory_bound_bytes": held if case.is_active else 0,
            "run_steps": base.training.steps,
            "stop_step": base.training.steps if name == "rkd" else stop_step,
            "warmup_steps": WARMUP_STEPS,
        }
        settings = {"warmup": WARMUP_STEPS, "total": WARMUP_STEPS + args.steps, "is_active": case.is_active}
        label = name if share is None else f"{name} {100 * share:g}%"
        planned.append(setup.run(label, own, settings=settings, details=details))
    return planned


class Suite(runs.Suite):
    """Measures rounds of `planned` runs, and notes each run in the result file."""

    def __init__(self, planned: Sequence[Run], args: argparse.Namespace, command: str) -> None:
        super().__init__(args, command, [asdict(run) for run in planned], args.interleave)
        self._runs = planned

    def measure(self) -> None:
        """Measures what is missing. RunFailedError if a run fails."""
        args, labels = self._args, [run.label for run in self._runs]
        found = [row for row in rows.read(args.out) if row.get("suite") == self.id]
        # What is started together, under which number; profiles have none.
        missing = missing_rounds(found, labels, args.pairs)
        together = [self._runs] if args.interleave else [[run] for run in self._runs]
        groups: list[tuple[int | None, Sequence[Run]]] = [(pair, group) for pair in missing for group in together]
        if num_known := args.pairs - len(missing):
            print(f"{args.out} has {num_known} of {args.pairs} pairs already; another --out measures anew", flush=True)
        if args.profile:
            profiled = {row["label"] for row in found if row["kind"] == PROFILE}
            active = [run for run in self._runs if run.settings["is_active"]]
            groups += [(None, [run]) for run in active if run.label not in profiled]
        for number, group in tqdm(groups, desc="throughput"):
            self._measure_group(number, group)

    def _measure_group(self, number: int | None, group: Sequence[Run]) -> None:
        what = f"pair {number + 1}" if number is not None else "profile"
        origin = self._origin_now()
        starts = [partial(self._start_run, run, what) for run in group]
        results = take_turns(starts, seed=number or 0) if len(group) > 1 else [starts[0](None).result()]
        for run, result in zip(group, results, strict=True):
            seconds = result.pop("step_seconds")
            speed = result["tokens_per_step"] * len(seconds) / result["wall_seconds"]
            own = {"unit": "s/step", "values": seconds, "tokens_per_second": speed, **result}
            turn = {} if number is None else {"pair": number, "interleaved": self._args.interleave}
            self._append(run, PROFILE if number is None else THROUGHPUT, origin, **turn, **own)
            tqdm.write(f"{what}, {run.label}: {speed:,.0f} tokens/s, {median(seconds):.3f} s/step")

    def _start_run(self, run: Run, what: str, turns: str | None) -> Running:
        """`turns`: where it gets its turns, if it takes any."""
        settings = {**run.settings, "profile": what == "profile", "turns": turns}
        return self._start(slug(f"{run.label} {what}"), run.label, argv=run.argv, settings=settings)


def missing_rounds(found: Sequence[rows.Row], labels: Sequence[str], pairs: int) -> list[int]:
    """Numbers of the rounds that a suite still has to measure: above all that are there, broken ones too."""
    measured: dict[int, set[str]] = {}
    for row in found:
        if row["kind"] == THROUGHPUT:
            measured.setdefault(row["pair"], set()).add(row["label"])
    first = max(measured, default=-1) + 1
    num_complete = sum(have >= set(labels) for have in measured.values())
    return list(range(first, first + max(pairs - num_complete, 0)))


def teacher_shape(student: Student, share: float) -> dict[str, int]:
    """A llama of a share of the student's size, its depth and width scaled by one factor; its weights do not matter.

    `share` is N_T / N_S of the FLOP bound. The feed-forward network's width makes up for what rounding has changed.
    """
    target = share * student.num_matmul_params
    # A block has about 12 width^2 parameters.
    factor = (target / (12 * student.num_blocks * student.width**2)) ** (1 / 3)
    num_layers = max(1, round(factor * student.num_blocks))
    dim = max(16, 16 * round(math.sqrt(target / (12 * num_layers)) / 16))
    if dim > 256:
        dim = 64 * round(dim / 64)
    hidden_dim = max(16, 16 * round((target / num_layers - 4 * dim * dim) / (3 * dim) / 16))
    head_width = next(width for width in (128, 64, 32, 16) if dim % width == 0 and (dim > width or width == 16))
    return {"dim": dim, "num_layers": num_layers, "num_heads": dim // head_width, "hidden_dim": hidden_dim}


def write_teacher(size: dict[str, int], vocab_size: int, folder: Path) -> Path:
    """The folder, below `folder`, of such a teacher in Hugging Face's format and bf16; written if missing."""
    name = "x".join(map(str, [*size.values(), vocab_size]))
    path = folder / f"random_llama_{name}"
    if (path / export_hf.WEIGHTS).exists():  # written last
        return path
    spec = llama_spec(path.name, vocab_size=vocab_size, tie_embeddings=True, **cast(Any, size))
    with keep_rng_state(torch.device("cpu")):
        torch.manual_seed(0)
        model: Any = spec.model.build()
        with torch.no_grad():
            model.init_weights(buffer_device=None)
    export_hf.write(spec, {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, path)
    return path
