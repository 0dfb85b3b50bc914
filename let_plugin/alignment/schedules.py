"""lambda as a function of the step. Schedules are stateless, so resuming is right by construction."""

from typing import Protocol

from let_plugin.registry import Registry


class Schedule(Protocol):
    """`step` is the number of optimizer steps already taken (0-based); the result is a fraction of `let.weight`."""

    def __call__(self, step: int, *, stop_step: int) -> float: ...


SCHEDULES: Registry[Schedule] = Registry("schedule", "let_plugin.schedules")


def linear(step: int, *, stop_step: int) -> float:
    """1 at step 0, falling linearly to 0 at `stop_step`, and 0 from there on (LET, arXiv 2602.05393)."""
    return max(0, stop_step - step) / stop_step if stop_step > 0 else 0.0


SCHEDULES.register("linear", linear)
