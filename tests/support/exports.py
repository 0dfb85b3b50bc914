"""Exports of the teacher's states, in this process."""

import argparse

from let_plugin.preflight import export_rows, teacher_cli
from let_plugin.preflight.export_plan import Plan


def plan_of(config, *argv, num_processes=1):
    parser = argparse.ArgumentParser()
    teacher_cli.add_export(parser.add_subparsers())
    return Plan.make(config, parser.parse_args(["export", "run.toml", *map(str, argv)]), num_processes)


def run(config, *argv):
    """Exports on the process group, of one process, that is there; returns the manifest."""
    plan = plan_of(config, *argv)
    plan.check_folder()
    return export_rows.export(plan)
