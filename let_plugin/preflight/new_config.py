"""`let-train new`: a TOML file to start from. Its comments are the options' own texts, its values those of the base.

What --check finds wrong is mended if it can be, and else said in a comment. Nothing is fetched: of a teacher on the
hub, what the client's cache has is read.
"""

import argparse
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from let_plugin.config.errors import ConfigError, Problem, raise_if_any

_ALIGNMENT = "let.token_alignment.enable"
_KEYS = (
    *("hf_assets_path", "dump_folder", "let.signal", "let.weight", "let.stop_fraction", "let.init.parts"),
    *("let.init.upper_blocks", "let.teacher.spec", "let.teacher.path", "let.teacher.tokenizer_path", _ALIGNMENT),
    *("training.local_batch_size", "training.global_batch_size", "training.seq_len", "training.steps"),
    *(f"optimizer.param_groups.{number}.optimizer_kwargs.lr" for number in range(8)),
    *("lr_scheduler.warmup_steps", "dataloader.dataset", "dataloader.dataset_path", "dataloader.num_workers"),
    *("validator.enable", "validator.freq", "validator.steps", "checkpoint.enable", "checkpoint.interval"),
    *("metrics.log_freq", "compile.enable"),
)


def main(argv: Sequence[str]) -> None:
    """Runs the command line. ConfigError for bad input, before anything is written."""
    parser = argparse.ArgumentParser(prog="let-train new", description="Writes a configuration of LET, with comments.")
    parser.add_argument("--base", required=True, metavar="MODULE.FUNCTION", help="the student's configuration function")
    parser.add_argument("--teacher", required=True, metavar="PATH", help="folder, .gguf file, hub name, or spec")
    parser.add_argument("--recipe", action="store_true", help="what brought most in docs/results.md, not the paper's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file (standard output)")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.exists():
        raise ConfigError(Problem("--out", "is there already; give a new file", str(args.out)))
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the client is imported
    text = new_config(args.base, args.teacher, recipe=args.recipe)
    if args.out is None:
        return print(text, end="")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")


def new_config(base: str, teacher: str, *, recipe: bool = False) -> str:
    """The TOML file for a configuration function and a teacher. ConfigError for what is wrong with either."""
    from let_plugin.runtime import data, host

    host.set_up("cpu")  # before torchtitan is imported
    data.register()
    from let_plugin.config.load import load_base
    from let_plugin.preflight.checks import examine
    from let_plugin.teacher.base import may_be_on_hub
    from let_plugin.teacher.titan.source import is_spec, with_spec_paths

    config: Any = load_base(base)
    let, table, notes = config.let, config.let.teacher, dict[str, str]()
    let.enable, let.stop_fraction = True, 0.5
    setattr(table, "spec" if is_spec(teacher) else "path", teacher)
    if recipe:  # what brought most in docs/results.md
        let.signal, let.weight, let.stop_fraction = "logits", 10.0, 1.0
        let.init.parts, let.init.upper_blocks = "both", "zero"
        for number, group in enumerate(config.optimizer.param_groups):
            if (rate := group.optimizer_kwargs.get("lr")) is not None:
                group.optimizer_kwargs = {**group.optimizer_kwargs, "lr": rate / 2}  # which several groups may share
                notes[f"optimizer.param_groups.{number}.optimizer_kwargs.lr"] = "Half of the base's."
    paths = with_spec_paths(table) if table.spec else table
    facts = examine(config, 1)
    longest = facts.source.info.max_seq_len if facts.source else None
    # What may mend a mistake; a student without a tokenizer takes the teacher's, as the paper's do.
    mends: dict[str, tuple[str, Any]] = {"hf_assets_path": ("hf_assets_path", paths.tokenizer_path or paths.path)}
    mends |= {"let.teacher.path": (_ALIGNMENT, True), "training.seq_len": ("training.seq_len", longest)}
    mends |= {key: (key, value) for key, value in (("let.init.parts", "embeddings"), ("let.init.upper_blocks", "keep"))}
    for wrong, (key, value) in mends.items():
        owner, name = attrgetter(key.rpartition(".")[0])(config) if "." in key else config, key.rpartition(".")[2]
        problem, old = {p.key: p for p in facts.problems}.get(wrong), getattr(owner, name)
        if problem is not None and value is not None:
            setattr(owner, name, value)
            now = examine(config, 1)
            if any(p.key in (wrong, key) for p in now.problems):
                setattr(owner, name, old)
            else:
                facts, notes[key] = now, f"Not {old!r}: {problem.message}."
    hopeless = {"let.enable"} if table.spec or may_be_on_hub(table.path) else {"let.enable", "let.teacher.path"}
    raise_if_any(problem for problem in facts.problems if problem.key in hopeless)
    notes |= {problem.key: f"Still wrong: {problem.message}." for problem in facts.problems}
    if notes.keys() & {"hf_assets_path", "let.teacher.path"} and not let.token_alignment.enable:
        notes.setdefault(_ALIGNMENT, "Set this if the two tokenizers differ.")
    title = f"{base}, guided by {teacher}. `let-train THIS_FILE --check` says what the run will do."
    return "\n".join([*_comment(title), f'base = "{base}"', *_lines(config, notes), ""])


def _lines(config: Any, notes: Mapping[str, str]) -> list[str]:
    """The keys with their texts and notes."""
    from let_plugin.config.reference import texts, toml
    from let_plugin.config.schema import walk

    values = {key: value for key, _, value in walk(config)}
    tables: dict[str, Any] = {"": config} | {key: value for key, value in values.items() if is_dataclass(value)}
    lines, current = [], ""
    for key in filter(values.__contains__, _KEYS):
        table, _, name = key.rpartition(".")
        if table != current:
            lines += ["", f"[{table}]"]
        current, value = table, "" if values[key] is None else values[key]
        lines += _comment(texts(type(tables[table])).get(name, "") if table in tables else "")
        lines += _comment(notes.get(key, ""))
        lines.append(f"{name} = {toml(value)}" if value != "" else f'# {name} = ""')
    return lines


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 110)]
