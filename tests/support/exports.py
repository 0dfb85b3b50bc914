"""Exports of the teacher's states, in this process."""

import argparse

from let_plugin.preflight import export
from let_plugin.preflight.export_plan import Plan


def plan_of(config, *argv, num_processes=1):
    parser = argparse.ArgumentParser()
    export.add_parser(parser.add_subparsers())
    args = parser.parse_args(["export", "run.toml", *map(str, argv)])
    return Plan.make(config, args, num_processes)


def run(config, *argv):
    """Exports on the process group, of one process, that is there; returns the manifest."""
    from let_plugin.preflight.export_rows import export as export_rows

    plan = plan_of(config, *argv)
    plan.check_folder()
    return export_rows(plan)
