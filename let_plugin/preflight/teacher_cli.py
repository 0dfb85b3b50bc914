"""The console command `let-teacher`: what there is to do with a teacher before a run.

Each subcommand is a module with `add_parser(subparsers)`, which sets `run`, a function of the parsed options; it
imports nothing large until it runs. One with `takes_overrides` gets what is no option of its own as `overrides`. Bad
input ends with one clear message and exit code 2.
"""

import argparse
import sys
from dataclasses import replace

from let_plugin.config.errors import ConfigError
from let_plugin.preflight import export, inspection

# Keys of the `[let]` table under the names that they have on this command line.
_OPTIONS = {
    "let.teacher.path": "PATH",
    "let.teacher.spec": "--spec",
    "let.teacher.tokenizer_path": "--tokenizer",
    "let.teacher.tiktoken": "--tiktoken",
    "let.teacher.trust_remote_code": "--trust-remote-code",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status; SystemExit with code 2 for options that there are not."""
    parser = argparse.ArgumentParser(prog="let-teacher", description="Teachers for Late-to-Early Training.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    inspection.add_parser(subparsers)
    export.add_parser(subparsers)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    try:
        options.run(options)
    except ConfigError as error:
        sys.stdout.flush()
        for problem in error.problems:
            print(f"error: {replace(problem, key=_on_command_line(problem.key))}", file=sys.stderr)
        return 2
    return 0


def _on_command_line(key: str) -> str:
    """A key, or one in a table that is an option: "--tiktoken, pattern"."""
    for name, option in _OPTIONS.items():
        if key == name or key.startswith(f"{name}."):
            return ", ".join([option, *filter(None, [key[len(name) + 1 :]])])
    return key


if __name__ == "__main__":
    sys.exit(main())
