"""`python -m let_plugin.teacher.export`: what `let-teacher export` runs on each rank."""

import sys

from let_plugin.preflight.teacher_cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
