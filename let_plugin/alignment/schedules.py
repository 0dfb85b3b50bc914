"""lambda as a function of the step. Schedules are stateless, so resuming is right by construction."""

import math
from dataclasses import dataclass
from typing import Protocol

from let_plugin.alignment.registry import Registry


class Schedule(Protocol):
    """`step` is the number of optimizer steps already taken (0-based); the result is a fraction of `let.weight`.

    It lies between 0 and 1, and is 0 at `stop_step` and from there on. Options are further keyword arguments, with
    defaults; ValueError for a bad value of one, in a message that begins with the option's name.
    """

    def __call__(self, step: int, *, stop_step: int) -> float: ...


@dataclass(frozen=True)
class ScheduleEntry:
    """A registered schedule.

    Attributes:
        function: The schedule.
        default_stop_fraction: Where it stops if the user does not say, as a fraction of the run.
    """

    function: Schedule
    default_stop_fraction: float = 0.5


# An entry point may give the plain function.
SCHEDULES: Registry[ScheduleEntry | Schedule] = Registry("schedule", "let_plugin.schedules")


def register_schedule(name: str, function: Schedule, *, default_stop_fraction: float = 0.5) -> None:
    """Makes `let.schedule = name` mean `function` (see Schedule and ScheduleEntry)."""
    SCHEDULES.register(name, ScheduleEntry(function, default_stop_fraction))


def get_schedule(name: str) -> ScheduleEntry:
    """The schedule called `name`; LookupError that suggests the nearest one if there is none."""
    entry = SCHEDULES.get(name)
    return entry if isinstance(entry, ScheduleEntry) else ScheduleEntry(entry)


def linear(step: int, *, stop_step: int) -> float:
    """1 at step 0, falling linearly to 0 at `stop_step`, and 0 from there on (LET, arXiv 2602.05393)."""
    return max(0, stop_step - step) / stop_step if stop_step > 0 else 0.0


def constant(step: int, *, stop_step: int) -> float:
    """1 before `stop_step`, and 0 from there on."""
    return 1.0 if step < stop_step else 0.0


def cosine(step: int, *, stop_step: int) -> float:
    """Half a cosine wave: 1 at step 0, steepest half-way, 0 from `stop_step` on."""
    return (1 + math.cos(math.pi * step / stop_step)) / 2 if step < stop_step else 0.0


def exponential(step: int, *, stop_step: int, final: float = 0.01) -> float:
    """final ** (step / stop_step): 1 at step 0, near `final` just before `stop_step`, and 0 from there on."""
    if not 0 < final < 1:
        raise ValueError("final must be greater than 0 and less than 1")
    return final ** (step / stop_step) if step < stop_step else 0.0


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """`schedule`, put off by `warmup_steps` in which the value rises linearly: (step + 1) / (warmup_steps + 1).

    It still ends at `stop_step`, even if that comes before the warm-up is over.
    """
    if warmup_steps < 0:
        raise ValueError("warmup_steps must not be negative")
    if warmup_steps == 0:
        return schedule

    def warmed_up(step: int, *, stop_step: int) -> float:
        if step >= stop_step:
            return 0.0
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return schedule(step - warmup_steps, stop_step=stop_step - warmup_steps)

    return warmed_up


register_schedule("linear", linear)
register_schedule("constant", constant, default_stop_fraction=1.0)
register_schedule("hard_stop", constant)
register_schedule("cosine", cosine)
register_schedule("exponential", exponential)
