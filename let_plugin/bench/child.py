"""`python -m let_plugin.bench.child REQUEST.json`: one run of let-train in a process of its own, measured from outside.

REQUEST.json is a `processes.Request`. Rank 0 writes the result.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from let_plugin import train
from let_plugin.bench.processes import Request

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer


def main(argv: list[str]) -> None:
    request = Request(**json.loads(Path(argv[0]).read_text()))
    train.main(
        list(request.argv),
        on_loaded=lambda config: adapt(config, request.num_blocks, request.test),
        on_built=lambda trainer: _watch(trainer, request),
    )


def adapt(config: "Trainer.Config", num_blocks: int | None, test: Any) -> None:
    """Changes the configuration where let-train has no option for it: see `Request`. In place."""
    if num_blocks is not None:
        from let_plugin.bench.converge import stacking

        stacking.shorten(config, num_blocks)
    if test is not None:
        from let_plugin.bench.converge.observe import add_test_split

        add_test_split(config, *test)


def _watch(trainer: "Trainer", request: Request) -> None:
    if request.measure == "throughput":
        from let_plugin.bench.throughput.measure import Watch

        Watch(trainer, request.out, **request.settings).start()
    else:
        from let_plugin.bench.converge.observe import Observer

        Observer(trainer, request.out).start()


if __name__ == "__main__":
    main(sys.argv[1:])
