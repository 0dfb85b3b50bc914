"""`python -m let_plugin.teacher.export`: what `let-teacher export` runs on each rank."""

import sys

from let_plugin.preflight.export import main

if __name__ == "__main__":
    main(sys.argv[1:])
