"""What is measured: cases, each a change of a user's configuration, in the sizes that were asked for."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torchtitan.trainer import Trainer

from let_plugin.alignment.registry import Registry
from let_plugin.bench.converge import methods
from let_plugin.bench.converge.methods import Resources
from let_plugin.bench.throughput.random_teacher import RandomTeacher
from let_plugin.config.errors import lookup

PLAIN = "plain"


@dataclass(frozen=True)
class Steps:
    """The steps of a run. All cases measure the same ones: the same batches, and garbage collection in the same places.

    Attributes:
        active: Steps with the teacher, in a run that goes on without.
        settling: Steps after those that are not measured yet.
        measured: How many are measured.
    """

    active: int = 2
    settling: int = 2
    measured: int = 8

    @property
    def warmup(self) -> int:
        """Steps that are not measured: they compile, and fill caches and the optimizer's state."""
        return self.active + self.settling

    @property
    def total(self) -> int:
        return self.warmup + self.measured


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        configure: Changes a configuration, whose stop is at the run's end, in place.
        is_active: Whether LET is to be active in the measured steps: a run where it is not so is an error.
        has_teacher: Whether there is one per size of teacher.
        reads_states: Whether the teacher's states are to be made beforehand; the run reads them and has no teacher.
        is_throughout: Whether the teacher would stay for a whole run, whatever the configuration's stop.
    """

    configure: Callable[[Trainer.Config, Steps], None]
    is_active: bool
    has_teacher: bool
    reads_states: bool = False
    is_throughout: bool = False


def _plain(config: Trainer.Config, steps: Steps) -> None:
    config.let.enable = False


def _active(config: Trainer.Config, steps: Steps) -> None:
    config.let.stop_step = steps.total


def _stopped(config: Trainer.Config, steps: Steps) -> None:
    config.let.stop_step = steps.active


def _rkd(config: Trainer.Config, steps: Steps) -> None:
    methods.configure(config, "rkd", None, Resources())
    config.let.stop_step = steps.total


CASES: Registry[Case] = Registry("benchmark case", "let_plugin.bench_cases")
CASES.register(PLAIN, Case(_plain, is_active=False, has_teacher=False))
CASES.register("control", Case(_plain, is_active=False, has_teacher=False))
CASES.register("active", Case(_active, is_active=True, has_teacher=True))
CASES.register("stopped", Case(_stopped, is_active=False, has_teacher=True))
CASES.register("features", Case(_active, is_active=True, has_teacher=True, reads_states=True))
CASES.register("rkd", Case(_rkd, is_active=True, has_teacher=True, is_throughout=True))


@dataclass(frozen=True)
class Variant:
    """A case in one size.

    Attributes:
        case: Name of the case.
        local_batch_size: Sequences per data-parallel rank and microbatch.
        seq_len: Tokens per sequence.
        teacher: A random teacher in place of the configured one.
        teacher_share: The share of the student's size that was asked for, with a random teacher.
        label: Names it apart from the others in a suite.
    """

    case: str
    local_batch_size: int
    seq_len: int
    teacher: RandomTeacher | None
    teacher_share: float | None
    label: str


def matrix(
    cases: Sequence[str],
    *,
    teachers: Sequence[tuple[float | None, RandomTeacher | None]],
    local_batch_sizes: Sequence[int],
    seq_lens: Sequence[int],
) -> list[Variant]:
    """All cases in all sizes, in the order in which each round measures them: what is compared is close in time.

    Args:
        cases: Names of cases; the plain one, which the others are compared with, comes first in any case.
        teachers: (share, teacher) of each size; (None, None) is the configured teacher.
        local_batch_sizes: One or more.
        seq_lens: One or more.
    """
    variants = []
    for batch, length in product(local_batch_sizes, seq_lens):
        size = f" batch {batch}" if len(local_batch_sizes) > 1 else ""
        size += f" length {length}" if len(seq_lens) > 1 else ""
        others = [name for name in dict.fromkeys(cases) if name != PLAIN]
        for name in [PLAIN, *others]:
            sizes = teachers if lookup(CASES.get, name, key="--cases").has_teacher else [(None, None)]
            for share, teacher in sizes:
                label = f"{name}{'' if share is None else f' {100 * share:g}%'}{size}"
                variants.append(Variant(name, batch, length, teacher, share, label))
    return variants


def baseline(variant: Variant, variants: Sequence[Variant]) -> Variant:
    """The plain one of the same size."""
    size = (variant.local_batch_size, variant.seq_len)
    return next(v for v in variants if v.case == PLAIN and (v.local_batch_size, v.seq_len) == size)


def configure(
    base: Trainer.Config, variant: Variant, steps: Steps, *, dump_folder: str, weights: str, states: str = ""
) -> Trainer.Config:
    """A copy of the user's configuration for one variant, with nothing in it that disturbs a measurement.

    Args:
        base: The user's.
        variant: What to make of it.
        steps: Of the run.
        dump_folder: Where the run writes.
        weights: Folder of the random teacher's weights, if the variant has one.
        states: Folder of the teacher's states, for a case that reads them once they are there; empty: the teacher.
    """
    config = copy.deepcopy(base)
    config.dump_folder = dump_folder
    config.training.steps = steps.total
    config.training.local_batch_size = variant.local_batch_size
    config.training.seq_len = variant.seq_len
    config.validator.enable = False
    config.checkpoint.enable = False
    config.profiler.enable_profiling = False
    config.profiler.enable_memory_snapshot = False
    # The first step is logged, which nobody measures, and then none.
    config.metrics.log_freq = steps.total + 1
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.debug.enable_structured_logging = False

    let = config.let
    let.enable = True
    let.warmup_steps = 0
    let.stop_step, let.stop_tokens, let.stop_fraction = steps.total, None, None
    let.adaptive_stop.criterion = "none"
    if variant.teacher is not None:
        let.target = "teacher"
        let.teacher = type(let.teacher)(
            spec=variant.teacher.name, path=weights, check_vocabulary=False, dtype=let.teacher.dtype
        )
    lookup(CASES.get, variant.case, key="--cases").configure(config, steps)
    if states:
        let.teacher = replace(let.teacher, features=states, spec="", path="")
    return config
