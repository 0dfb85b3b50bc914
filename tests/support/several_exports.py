"""Exports one after the other in one process, so that starting processes does not take all the time.

python -m tests.support.several_exports ARGUMENTS         a list in JSON: what `let-teacher export` gets each time
"""

import json
import sys

from let_plugin.preflight import export


def main():
    for argv in json.loads(sys.argv[1]):
        export.main(argv)


if __name__ == "__main__":
    main()
