"""`let-bench eval`: a checkpoint on lm-eval's tasks, by way of transformers; the scores become a row."""

import difflib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from let_plugin.bench import hf_export, rows
from let_plugin.config import load as toml_config
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import data

# The paper's nine (arXiv 2602.05393), one-shot, by lm-eval's names.
TASKS = (
    *("hellaswag", "winogrande", "lambada_openai", "openbookqa", "arc_easy"),
    *("arc_challenge", "piqa", "sciq", "boolq"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the command line.

    Attributes:
        tasks: lm-eval's names.
        num_fewshot: Examples in the prompt.
        include_path: A folder of tasks of one's own (YAML); None: lm-eval's tasks only.
        limit: At most so many documents per task; None: all.
        batch_size: Requests at a time.
        max_length: Longest input in tokens, cut from the left; None: the length that the model was trained at.
        export: Where the exported model stays; None: nowhere.
        out: Result file.
    """

    tasks: Sequence[str] = TASKS
    num_fewshot: int = 1
    include_path: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    export: Path | None = None
    out: Path

    def check(self) -> None:
        """ConfigError with all that is wrong."""
        problems = []
        if find_spec("lm_eval") is None:
            problems.append(Problem("let-bench eval", 'needs lm-eval; pip install "let-plugin[eval]"'))
        for name, value, least in (
            ("--num-fewshot", self.num_fewshot, 0),
            ("--limit", self.limit, 1),
            ("--batch-size", self.batch_size, 1),
            ("--max-length", self.max_length, 2),
        ):
            if value is not None and value < least:
                problems.append(Problem(name, f"must be at least {least}", value))
        if self.include_path is not None and not self.include_path.is_dir():
            problems.append(Problem("--include-path", "no such folder", str(self.include_path)))
        if self.out.is_dir():
            problems.append(Problem("--out", "a folder; expected a file", str(self.out)))
        if problems:
            raise ConfigError(problems)
        rows.read(self.out)


def run(checkpoint: str, config_file: Path, overrides: Sequence[str], options: Options, command: str) -> str:
    """Exports, evaluates and appends a row; returns the scores as text. The host is set up, the options checked.

    ConfigError for bad input, before anything is evaluated, and for tasks whose data cannot be had.
    """
    logger.setLevel(logging.ERROR)
    loaded = toml_config.load(config_file, list(overrides))
    data.register()
    manager = _task_manager(options)
    origin = rows.provenance()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.export or Path(scratch, "model")
        hf_export.export(loaded.config, checkpoint, folder)
        max_length = options.max_length or loaded.config.training.seq_len
        results = _evaluate(folder, max_length, options, manager)
    new = rows.row(
        "eval",
        command=command,
        config=toml_config.dump(loaded),
        seed=None,
        unit="score",
        values=[main_score(scores) for scores in results.values()],
        origin=origin,
        checkpoint=checkpoint,
        device_name=utils.device_module.get_device_name(),
        results=results,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        max_length=max_length,
        lm_eval=version("lm-eval"),
    )
    rows.append(options.out, new)
    lines = [
        f"{task}: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}"
        for task, scores in results.items()
    ]
    return "\n".join([*lines, f"mean of {len(lines)} tasks: {sum(new['values']) / len(lines):.4f}"])


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's scores of a task as metric -> value, its standard error as metric_stderr.

    lm-eval names them "metric,filter"; the filter "none" is left out.
    """
    found = {}
    for key, value in result.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float):
            found[metric if chosen == "none" else f"{metric} ({chosen})"] = float(value)
    return found


def main_score(scores: Mapping[str, float]) -> float:
    """The accuracy, where a task has one; else its first metric."""
    return scores["acc"] if "acc" in scores else next(iter(scores.values()))


def _task_manager(options: Options) -> Any:
    """lm-eval's index of tasks. ConfigError for each task that is not in it."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    problems = []
    for task in options.tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists them"
            problems.append(Problem("--tasks", f"lm-eval has no such task; {remedy}", task))
    if problems:
        raise ConfigError(problems)
    return manager


def _evaluate(folder: Path, max_length: int, options: Options, manager: Any) -> dict[str, dict[str, float]]:
    """Task -> its scores."""
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "auto", "max_length": max_length},
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            device=utils.device_type,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # a data set that is not there, no network: all of them are OSErrors
        message = f"the data of a task cannot be had ({type(error).__name__}: {error}); is there a network?"
        raise ConfigError(Problem("--tasks", message, list(options.tasks))) from error
    assert found is not None  # it is None on other ranks than the first
    return {task: scores_of(result) for task, result in found["results"].items()}
