"""`python -m let_plugin.bench.child REQUEST.json`: one run of let-train in a process of its own, measured from outside.

REQUEST.json has let-train's arguments `argv`; the file `out` for the result, which rank 0 writes; the `settings` of the
measuring class, none for a convergence suite; and, for `adapt`, `num_blocks`, `test` and `saved`, if there are any.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from let_plugin import train


def main(argv: list[str]) -> None:
    request = json.loads(Path(argv[0]).read_text())
    # A run that ends before its last step is of no use here: at once, with no checkpoint, and no result.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))

    def watch(trainer: Any) -> None:
        from let_plugin.bench.converge.observe import Observer
        from let_plugin.bench.throughput.measure import Watch

        out, settings = request["out"], request["settings"]
        (Watch(trainer, out, **settings) if settings else Observer(trainer, out, request.get("saved"))).start()

    adapted = partial(adapt, **{name: request.get(name) for name in ("num_blocks", "test", "saved")})
    train.main(request["argv"], on_loaded=adapted, on_built=watch)


def adapt(config: Any, num_blocks: int | None, test: Sequence[str] | None, saved: str | None = None) -> None:
    """Changes the configuration where let-train has no option for it. In place.

    `num_blocks`: train the student's first blocks only. `test`: (dataset, path) of a test split to evaluate as well.
    `saved`: a folder for what a run needs to go on from its last evaluation, which it does if that is there.
    """
    from let_plugin.bench.converge import observe, stacking

    if num_blocks is not None:
        stacking.shorten(config, num_blocks)
    if test is not None:
        observe.add_test_split(config, *test)
    if saved is not None:
        observe.save_at_evaluations(config, Path(saved))


if __name__ == "__main__":
    main(sys.argv[1:])
