"""The console command `let-teacher`: what there is to do with a teacher before a run.

Nothing large is imported until a subcommand runs.
"""

import argparse

from let_plugin.config.errors import ConfigError, exit_with
from let_plugin.preflight import export, inspection


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; SystemExit with code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="let-teacher", description="Teachers for Late-to-Early Training.")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    inspection.add_parser(subparsers)
    export.add_parser(subparsers)
    args, overrides = parser.parse_known_args(argv)
    if overrides and args.command != "export":  # only an export has a configuration to override
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.overrides = overrides
    try:
        args.run(args)
    except ConfigError as error:
        exit_with(error, f"let-teacher {args.command}")


if __name__ == "__main__":
    main()
