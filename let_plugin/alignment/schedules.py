"""lambda as a function of the step. Schedules are stateless, so resuming is right by construction."""

import math
from typing import Protocol

from let_plugin.alignment.registry import Registry


class Schedule(Protocol):
    """`step` is the number of optimizer steps already taken (0-based); the result is a fraction of `let.weight`.

    The result lies between 0 and 1, and is 0 from `stop_step` on. Options are further keyword-only arguments with
    defaults. ValueError for a bad one, in a message that begins with its name.
    """

    def __call__(self, step: int, *, stop_step: int) -> float: ...


SCHEDULES: Registry[Schedule] = Registry("schedule", "let_plugin.schedules")


def register_schedule(name: str, function: Schedule) -> None:
    """Makes `let.schedule = name` mean `function`. ValueError if the name is taken."""
    SCHEDULES.register(name, function)


def linear(step: int, *, stop_step: int) -> float:
    """1 at step 0, falling linearly to 0 at `stop_step`, and 0 from there on (LET, arXiv 2602.05393)."""
    return max(0, stop_step - step) / stop_step if stop_step > 0 else 0.0


def constant(step: int, *, stop_step: int) -> float:
    """1 before `stop_step`, and 0 from there on."""
    return 1.0 if step < stop_step else 0.0


def cosine(step: int, *, stop_step: int) -> float:
    """Half a cosine wave: 1 at step 0, steepest half-way, 0 from `stop_step` on."""
    return (1 + math.cos(math.pi * step / stop_step)) / 2 if step < stop_step else 0.0


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """`schedule` after `warmup_steps` in which the value rises linearly: (step + 1) / (warmup_steps + 1)."""

    def warmed_up(step: int, *, stop_step: int) -> float:
        if step >= stop_step:
            return 0.0
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return schedule(step - warmup_steps, stop_step=stop_step - warmup_steps)

    return warmed_up


register_schedule("linear", linear)
register_schedule("constant", constant)
register_schedule("cosine", cosine)
