"""An export into small files that is killed (SIGKILL) when it has taken so many rows.

python -m tests.support.killed_export NUM_ROWS CONFIG.toml ...         let-teacher export; -1: it is not killed
"""

import os
import signal
import sys

from let_plugin.preflight import teacher_cli
from let_plugin.runtime import host


def main():
    num_rows, *argv = sys.argv[1:]
    host.set_up("cpu")
    from let_plugin.preflight import export_rows

    class Writer(export_rows.ShardWriter):
        left = int(num_rows)

        def add(self, *args):
            if Writer.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            Writer.left -= 1
            super().add(*args)

    export_rows.ShardWriter = Writer
    export_rows.SHARD_BYTES = 2**14  # two rows of the tiny teacher's
    teacher_cli.main(["export", *argv])


if __name__ == "__main__":
    main()
