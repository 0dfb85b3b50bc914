"""What `let-bench throughput` measures: cases, each a list of let-train options."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from let_plugin.bench.converge.methods import METHODS
from let_plugin.bench.runs import QUIET

PLAIN = "plain"

# Steps before the measured ones: those with a teacher, in a run that stops it, and those after its stop. They compile,
# and fill caches and the optimizer's state. All cases measure the same steps, so the same batches.
ACTIVE_STEPS, SETTLING_STEPS = 2, 2
WARMUP_STEPS = ACTIVE_STEPS + SETTLING_STEPS

_TURN_SECONDS = str(24 * 3600)


@dataclass(frozen=True)
class Case:
    """Something to measure: options of let-train, beside those of all cases."""

    options: tuple[str, ...] = ()
    is_active: bool = False  # the teacher is there in the measured steps; a run where it is not so is an error
    has_teacher: bool = True  # it runs with LET, and once for each size of teacher
    is_throughout: bool = False  # the teacher would stay for a whole run, whatever the configuration's stop


CASES = {
    PLAIN: Case(has_teacher=False),
    "control": Case(has_teacher=False),
    "active": Case(is_active=True),
    "stopped": Case(),
    "rkd": Case((*METHODS["rkd"].defaults, *METHODS["rkd"].options), is_active=True, is_throughout=True),
}


@dataclass(frozen=True)
class Variant:
    """A case with one size of teacher, with its name in the suite."""

    case: str
    teacher_share: float | None  # size of a random teacher, as a share of the student's; None: the configured teacher
    label: str


def variants(cases: Sequence[str], shares: Sequence[float]) -> list[Variant]:
    """All cases, in the order of a round: what is compared is close in time. The plain case comes first.

    `shares` are the sizes of random teachers; none: the configured teacher.
    """
    return [
        Variant(name, share, name if share is None else f"{name} {100 * share:g}%")
        for name in dict.fromkeys([PLAIN, *cases])
        for share in (shares if CASES[name].has_teacher else ()) or (None,)
    ]


def options(variant: Variant, measured: int, work: Path, teacher: Path | None, *, interleave: bool) -> list[str]:
    """The options of let-train for a variant of so many measured steps, with nothing that disturbs a measurement.

    `work` is the folder for what runs write, `teacher` that of the random teacher (None: the configured one);
    `interleave`: the runs make their steps in turn.
    """
    total = WARMUP_STEPS + measured
    found = [*QUIET, "--validator.no-enable", "--dump_folder", str(work / "dump"), "--training.steps", str(total)]
    found += ["--metrics.log_freq", str(total + 1)]  # the first step is logged, which nobody measures, and then none
    if interleave:  # a process waits for its turn in a collective while others compile
        found += ["--comm.init-timeout-seconds", _TURN_SECONDS, "--comm.train-timeout-seconds", _TURN_SECONDS]
    case = CASES[variant.case]
    if not case.has_teacher:
        return [*found, "--let.no-enable"]
    found += ["--let.enable", "--let.warmup-steps", "0", "--let.adaptive-stop.criterion", "none"]
    if teacher is not None:
        found += ["--let.teacher.path", str(teacher), "--let.teacher.spec", "", "--let.teacher.features", ""]
        found += ["--let.teacher.tokenizer_path", "", "--let.teacher.no-check-vocabulary"]
        found += ["--let.teacher.final-norm", "--let.teacher.no-center", "--let.token-alignment.no-enable"]
    stop = total if case.is_active else ACTIVE_STEPS
    return [
        *(*found, *case.options),
        *("--let.stop-tokens", "None", "--let.stop-fraction", "None", "--let.stop-step", str(stop)),
    ]
