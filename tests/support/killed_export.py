"""An export into small files that is killed (SIGKILL) when it has taken so many rows.

python -m tests.support.killed_export NUM_ROWS CONFIG.toml ...         let-teacher export; -1: it is not killed
"""

import os
import signal
import sys

from let_plugin.preflight import export
from let_plugin.runtime import host


def main():
    num_rows, *argv = sys.argv[1:]
    host.set_up("cpu")
    from let_plugin.preflight import export_plan
    from let_plugin.teacher.stored.shards import ShardWriter

    add, left = ShardWriter.add, int(num_rows)

    def add_or_die(self, *args):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        add(self, *args)

    ShardWriter.add = add_or_die
    export_plan.SHARD_BYTES = 2**14  # two rows of the tiny teacher's
    export.main(argv)


if __name__ == "__main__":
    main()
