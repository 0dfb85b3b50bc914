"""The console command `let-teacher`: what there is to do with a teacher before a run.

Nothing large is imported until a subcommand runs. Bad input ends with one clear message and exit code 2.
"""

import argparse
import sys
from dataclasses import replace

from let_plugin.config.errors import ConfigError
from let_plugin.preflight import export, inspection

# Keys of the `[let]` table -> their names on this command line.
_OPTIONS = {
    "let.teacher.path": "PATH",
    "let.teacher.spec": "--spec",
    "let.teacher.tokenizer_path": "--tokenizer",
    "let.teacher.trust_remote_code": "--trust-remote-code",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status; SystemExit with code 2 for unknown options."""
    parser = argparse.ArgumentParser(prog="let-teacher", description="Teachers for Late-to-Early Training.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    inspection.add_parser(subparsers)
    export.add_parser(subparsers)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.run is not export.run:  # only an export has a configuration to override
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    try:
        options.run(options)
    except ConfigError as error:
        sys.stdout.flush()
        for problem in error.problems:
            print(f"error: {replace(problem, key=_OPTIONS.get(problem.key, problem.key))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
