"""The `let-bench` command. Bad input ends with one clear message and exit code 2, as let-train's does."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from let_plugin.bench.rows import command_line
from let_plugin.config import load as toml_config
from let_plugin.config.errors import ConfigError, Problem, listing

_PROGRAM = "let-bench"


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; SystemExit with code 2 for bad input, 1 for a run that failed, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Measures what LET costs and what it brings.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_throughput(subparsers)
    _add_converge(subparsers)
    _add_table(subparsers)
    _add_report(subparsers)
    _add_plot(subparsers)
    _add_eval(subparsers)
    # What is not the benchmark's own is the configuration's: --section.key VALUE.
    args, overrides = parser.parse_known_args(argv)
    try:
        args.function(args, overrides, command_line(_PROGRAM, argv))
    except ConfigError as error:
        print(listing(error, _PROGRAM), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{_PROGRAM}: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def _add_throughput(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "throughput",
        help="tokens/s, step time and peak memory with LET and without",
        description="Measures tokens/s, step time and peak memory of a configuration with LET and without: each case "
        "in a process of its own, the cases in turn. Called again with the same settings, it goes on where it was "
        "stopped.",
        epilog="Options of the configuration, --section.key VALUE, are let-train's.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["active", "stopped"],
        metavar="CASE",
        help="beside plain: active, stopped, features, rkd (active stopped)",
    )
    parser.add_argument("--pairs", type=int, default=7, help="how often each case is measured (7)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run, after 4 that are not (8)")
    parser.add_argument(
        "--teacher-share",
        type=float,
        nargs="+",
        default=[],
        metavar="P",
        help="random teachers of P %% of the student's size, in place of the configured one",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[], metavar="B", help="local batch sizes")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[], metavar="L", help="sequence lengths")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run, by torchrun (1)")
    parser.add_argument("--profile", action="store_true", help="one more run per case: where the overhead goes")
    parser.add_argument(
        "--interleave",
        action="store_true",
        help="the cases make their steps in turn: for noisy machines, with memory for all of them at once",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/throughput.jsonl"), help="file of rows")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/bench"), help="logs, random teachers")
    parser.set_defaults(function=_throughput)


def _add_converge(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "converge",
        help="held-out loss of LET and what it is compared with, over seeds",
        description="Trains a configuration with one method after the other, on the same data in the same order, and "
        "with each seed: held-out loss, speed-up, and what is significant. Called again with the same settings, it "
        "goes on where it was stopped.",
        epilog="Options of the configuration, --section.key VALUE, are let-train's.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["let", "rkd", "salt", "labels", "random_teacher", "shuffled_targets"],
        metavar="M",
        help="beside standard: let, rkd, salt, kd_large, labels, random_teacher, shuffled_targets, gstack, miniplm; "
        "let@0.1 is LET at that weight, and so for all but standard, gstack and miniplm (let rkd salt and the three "
        "controls)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="S", help="(0 1 2 3 4)")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[], metavar="W", help="a grid to choose each method's weight from"
    )
    parser.add_argument(
        "--tuning-seeds", type=int, nargs="+", metavar="S", help="of the runs that choose (the one after --seeds)"
    )
    parser.add_argument("--test-dataset", default="", metavar="NAME", help="dataset that the result is read on")
    parser.add_argument("--test-path", default="", metavar="PATH", help="its files, if the name does not say so")
    parser.add_argument("--large-teacher", metavar="MODEL", help="of kd_large: a path, or a table as [let.teacher] has")
    parser.add_argument("--selected-text", type=Path, metavar="FILE", help="of miniplm: see its data_selection")
    parser.add_argument("--gstack-blocks", type=int, metavar="N", help="of gstack: blocks of the shallow model")
    parser.add_argument("--gstack-steps", type=int, metavar="N", help="of gstack: steps of the shallow model")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run, by torchrun (1)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/converge.jsonl"), help="file of rows")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/bench/converge"), help="logs, dump folders")
    parser.set_defaults(function=_converge)


def _set_up(args: argparse.Namespace, overrides: list[str]) -> None:
    """Before torchtitan is imported."""
    runtime = toml_config.read([str(args.config), *overrides]).runtime

    from let_plugin.runtime import host

    host.set_up(runtime.device)


def _print(measure: Callable[[], str]) -> None:
    """Prints the table that `measure` returns; SystemExit with code 1 if a run fails."""
    from let_plugin.bench.processes import RunFailedError

    try:
        print(f"\n{measure()}")
    except RunFailedError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _converge(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    _set_up(args, overrides)

    from let_plugin.bench.converge import run as converge
    from let_plugin.bench.converge.data_selection import parse_model
    from let_plugin.bench.converge.methods import Resources
    from let_plugin.bench.converge.plan import Options

    large_teacher = None if args.large_teacher is None else parse_model(args.large_teacher, "--large-teacher")
    options = Options(
        methods=args.methods,
        seeds=args.seeds,
        tuning_seeds=[max(args.seeds) + 1] if args.tuning_seeds is None else args.tuning_seeds,
        weights=args.weights,
        test_dataset=args.test_dataset,
        test_path=args.test_path,
        resources=Resources(
            large_teacher=large_teacher,
            selected_text=args.selected_text,
            shallow_blocks=args.gstack_blocks,
            shallow_steps=args.gstack_steps,
        ),
        num_processes=args.processes,
        out=args.out,
        work=args.work_dir,
    )
    options.check()
    _print(lambda: converge.run(args.config, overrides, options, command))


def _throughput(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    _set_up(args, overrides)

    from let_plugin.bench.throughput import run as throughput
    from let_plugin.bench.throughput.cases import Steps

    options = throughput.Options(
        cases=args.cases,
        pairs=args.pairs,
        steps=Steps(measured=args.steps),
        num_processes=args.processes,
        teacher_shares=[share / 100 for share in args.teacher_share],
        local_batch_sizes=args.batch_sizes,
        seq_lens=args.seq_lens,
        out=args.out,
        work=args.work_dir,
        profile=args.profile,
        interleave=args.interleave,
    )
    options.check()
    _print(lambda: throughput.run(args.config, overrides, options, command))


def _add_table(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "table",
        help="the tables of rows that are there",
        description="Prints the tables of throughput and convergence rows, as the commands that measured them do.",
        allow_abbrev=False,
    )
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl")
    parser.set_defaults(function=_table)


def _table(args: argparse.Namespace, others: list[str], command: str) -> None:
    _refuse(others, "table")

    from let_plugin.bench import tables

    print(tables.text(args.rows))


def _refuse(others: list[str], command: str) -> None:
    """ConfigError for what is no option of a command that takes no configuration."""
    if others:
        raise ConfigError(Problem(other, f"no such option of let-bench {command}") for other in others)


def _add_report(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "report",
        help="a page of what the rows say",
        description="Writes a page that needs nothing beside it: what the rows say, and nothing else.",
        allow_abbrev=False,
    )
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="an older page is replaced")
    parser.set_defaults(function=_report)


def _report(args: argparse.Namespace, others: list[str], command: str) -> None:
    _refuse(others, "report")

    from let_plugin.bench import report

    report.write(args.rows, args.out)
    print(args.out)


def _add_plot(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "plot",
        help="curves of runs, side by side",
        description="Draws the metrics of runs (metrics.jsonl in their dump folders) side by side, or the held-out "
        "losses of convergence rows.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="dump folder, or file of rows")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".html, .png or .svg")
    parser.set_defaults(function=_plot)


def _plot(args: argparse.Namespace, others: list[str], command: str) -> None:
    _refuse(others, "plot")

    from let_plugin.bench import report

    report.plot(args.runs, args.out)
    print(args.out)


def _add_eval(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "eval",
        help="downstream tasks, by lm-eval",
        description="Exports a checkpoint to Hugging Face's format and evaluates it by lm-eval; the scores are "
        "appended to a file of rows. The default tasks are the paper's nine, whose data come from the network.",
        epilog="Options of the configuration, --section.key VALUE, are let-train's.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a torchtitan checkpoint (.../step-N)")
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG.toml", help="what it was trained with")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-eval's names (the paper's nine)")
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="tasks of your own, as YAML")
    parser.add_argument("--num-fewshot", type=int, default=1, help="examples in the prompt (1)")
    parser.add_argument("--limit", type=int, help="documents per task (all)")
    parser.add_argument("--batch-size", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--max-length", type=int, help="longest input in tokens (training.seq_len)")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="keep the exported model there")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/eval.jsonl"), help="file of rows")
    parser.set_defaults(function=_eval)


def _eval(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    runtime = toml_config.read([str(args.config), *overrides]).runtime

    from let_plugin.runtime import host

    host.set_up(runtime.device)  # before torchtitan is imported

    from let_plugin.bench import evaluation

    options = evaluation.Options(
        tasks=args.tasks or evaluation.TASKS,
        num_fewshot=args.num_fewshot,
        include_path=args.include_path,
        limit=args.limit,
        batch_size=args.batch_size,
        max_length=args.max_length,
        export=args.export,
        out=args.out,
    )
    options.check()
    print(f"\n{evaluation.run(args.checkpoint, args.config, overrides, options, command)}")
