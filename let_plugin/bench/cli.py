"""The `let-bench` command. Bad input ends with one clear message and exit code 2, as let-train's does."""

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from let_plugin.bench.processes import RunFailedError
from let_plugin.bench.rows import command_line
from let_plugin.config import load as toml_config
from let_plugin.config.errors import ConfigError, Problem, exit_with

_PROGRAM = "let-bench"
_LIBRARIES = ("jinja2", "pandas", "scipy", "vl_convert")
_OF_LET_TRAIN = "Other options, --section.key VALUE, are let-train's."
_GOES_ON = f"Called again with the same settings, it continues where it was stopped. {_OF_LET_TRAIN}"


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; SystemExit: 2 for bad input, 1 for a run that failed, 130 if interrupted or terminated."""
    argv = sys.argv[1:] if argv is None else argv
    args, options = parse(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends the run that it has started
    try:
        if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
            raise ConfigError(Problem(_PROGRAM, f'needs {", ".join(missing)}; pip install "let-plugin[bench]"'))
        if "config" in args:
            print(_of_configuration(args, options, command_line(_PROGRAM, argv)))
        else:
            print(_show(args))
    except ConfigError as error:
        exit_with(error, _PROGRAM)
    except RunFailedError as error:
        raise SystemExit(f"{_PROGRAM}: {error}") from None  # code 1
    except KeyboardInterrupt:
        print(f"\n{_PROGRAM}: interrupted; the same command continues from here", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its own options, and let-train's options."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Measures what LET costs and what it brings.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, description: str) -> argparse.ArgumentParser:
        return subparsers.add_parser(name, help=description, description=description, allow_abbrev=False)

    costs = "tokens/s, step time and peak memory of a configuration with LET and without, each run in its own process"
    gains = "held-out loss of LET and of what it is compared with, on the same data in the same order, over seeds"
    for name, what, add in (("throughput", costs, _add_throughput), ("converge", gains, _add_converge)):
        suite, out = command(name, f"{what}. {_GOES_ON}"), Path("outputs/bench")
        add(suite)
        suite.add_argument("config", type=Path, metavar="CONFIG.toml")
        suite.add_argument("--processes", type=_number(int, 1), default=1, help="processes of a run, by torchrun (1)")
        suite.add_argument("--out", type=_file, default=out / f"{name}.jsonl", help="file of rows")
        suite.add_argument("--name", default="", metavar="QUESTION", help="what it answers: its title on the page")
        suite.add_argument("--work-dir", type=Path, default=out / name, help="for logs and what runs write")
    table = command("table", "the tables of rows that are there, as their suites print them")
    report = command("report", "one page of what the rows say, that needs nothing beside it")
    report.add_argument("--out", type=_file, required=True, metavar="PAGE.html", help="an older page is replaced")
    for reader in (table, report):
        reader.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl")
    plot = command("plot", "curves of runs (metrics.jsonl), or held-out losses of convergence rows, side by side")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="dump folder, or file of rows")
    plot.add_argument("--out", type=Path, required=True, metavar="FILE", help=".html, .png or .svg")
    export = command("export", f"a checkpoint as a folder that transformers and lm-eval open. {_OF_LET_TRAIN}")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a torchtitan checkpoint (.../step-N)")
    export.add_argument("--config", type=Path, required=True, metavar="CONFIG.toml", help="what it was trained with")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the model")
    select = command("select", f"the training documents that the teacher finds easier (MiniPLM). {_OF_LET_TRAIN}")
    select.add_argument("config", type=Path, metavar="CONFIG.toml", help="its documents, and let.teacher")
    help_ = "path, or options of let-train ('--let.teacher.spec x --let.teacher.path y'), for the reference"
    select.add_argument("--reference", required=True, metavar="MODEL", help=help_)
    select.add_argument("--out", required=True, type=_file, metavar="FILE", help="new: .jsonl, .jsonl.xz, .jsonl.gz")
    select.add_argument("--keep", type=_number(float, 0, 1), default=0.5, help="share of the documents (0.5)")
    args, options = parser.parse_known_args(argv)
    if options and "config" not in args:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    return args, options


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    cases = ("plain", "active", "rows", "stopped", "rkd", "control")
    help_ = "beside plain: active, rows (a teacher on a quarter of them), stopped, rkd, control (active stopped)"
    add("--cases", nargs="+", default=["active", "stopped"], choices=cases, metavar="CASE", help=help_)
    # Without a spread there is no interval: two of each.
    add("--pairs", type=_number(int, 2), default=7, help="how often each case is measured (7; at least 2)")
    add("--steps", type=_number(int, 2), default=8, help="measured steps of a run, after 4 that are not (8)")
    help_ = "random teachers of P %% of the student's size, instead of the configured one"
    add("--teacher-share", type=_number(float, 0.01, 100), nargs="+", default=[], metavar="P", help=help_)
    add("--profile", action="store_true", help="one more run per case: where the overhead goes")
    help_ = "the cases make their steps in turn: for noisy machines, with memory for all of them at once"
    add("--interleave", action="store_true", help=help_)


def _add_converge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    methods = ["let", "rkd", "salt", "labels", "random_teacher", "shuffled_targets"]
    help_ = (
        "beside standard: let, rkd, salt, labels, random_teacher, shuffled_targets, gstack, or of "
        "--methods-file; let@0.1 is LET at that weight; 'NAME = let --section.key VALUE ...' is a method of your own "
        "(let rkd salt and the three controls)"
    )
    add("--methods", nargs="+", default=methods, metavar="M", help=help_)
    add("--methods-file", type=Path, metavar="FILE.toml", help="methods as NAME = [options of let-train]")
    seeds: dict[str, Any] = {"type": _number(int, 0), "nargs": "+", "metavar": "S"}
    add("--seeds", default=[0, 1, 2, 3, 4], help="of the results (0 1 2 3 4)", **seeds)
    add("--tuning-seeds", default=[5], help="of the runs that choose (5)", **seeds)
    help_ = "an option of let-train and values to choose from for each method; several: all combinations"
    add("--grid", nargs="+", action="append", default=[], metavar=("KEY", "VALUE"), help=help_)
    add("--test-dataset", default="", metavar="NAME", help="dataset that the result is read on")
    add("--test-path", default="", metavar="PATH", help="its files, if the name does not say so")
    help_ = "a checkpoint at each evaluation: a run that was broken off goes on from its last one"
    add("--resumable", action="store_true", help=help_)
    add("--gstack-blocks", type=_number(int, 1), metavar="N", help="of gstack: blocks of the shallow model")
    add("--gstack-steps", type=_number(int, 1), metavar="N", help="of gstack: steps of the shallow model")


def _number(kind: type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            limit = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a number {limit}, not {text}")
        return value

    return number


def _file(text: str) -> Path:
    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; expected a file")
    return path


def _show(args: argparse.Namespace) -> str:
    """Shows what is there: rows as tables or a page, or the curves of runs."""
    from let_plugin.bench import report, tables

    if args.command == "table":
        return tables.text(args.rows)
    write, inputs = (report.write, args.rows) if args.command == "report" else (report.plot, args.runs)
    write(inputs, args.out)
    return str(args.out)


def _of_configuration(args: argparse.Namespace, options: list[str], command: str) -> str:
    """Runs a suite and returns its table, selects or exports."""
    from let_plugin.runtime import data, host

    host.set_up(toml_config.read([str(args.config), *options]).runtime.device)  # before torchtitan is imported
    data.register()

    from torchtitan.tools.logging import logger

    from let_plugin.bench import export_hf
    from let_plugin.bench.converge import data_selection
    from let_plugin.bench.converge import run as converge
    from let_plugin.bench.throughput import suite as throughput
    from let_plugin.preflight.checks import check_writable

    logger.setLevel(logging.ERROR)  # torchtitan's remarks on each of many configurations
    if args.command == "export":
        export_hf.export(toml_config.load(args.config, options).config, args.checkpoint, args.out)
        return f"wrote {args.out}"
    if args.command == "select":
        return data_selection.run(args, options)
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(Problem("--processes", "started under torchrun; start let-bench alone, and it starts them"))
    check_writable("--work-dir", args.work_dir)
    check_writable("--out", args.out.parent)
    return f"\n{(throughput if args.command == 'throughput' else converge).run(args, options, command)}"
