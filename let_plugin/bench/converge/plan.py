"""The runs of `let-bench converge`: which there are, each with its options of let-train and what it costs."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import product
from typing import Any

from let_plugin.bench.converge import data_selection, methods
from let_plugin.bench.converge.methods import WEIGHT, Method
from let_plugin.bench.processes import slug
from let_plugin.bench.rows import BASELINE
from let_plugin.bench.runs import QUIET, Run, Setup, active_cost
from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.preflight.report import Student
from let_plugin.runtime.held_out import TwoSplitValidator
from let_plugin.teacher.retokenized import teacher_seq_len
from let_plugin.teacher.stored.features import Features

# A point of a grid: (key, value) of each of its keys.
Point = tuple[tuple[str, str], ...]


class Planner:
    """The runs of a suite, checked. ConfigError lists all that is wrong with any of them."""

    def __init__(self, args: argparse.Namespace, options: Sequence[str]) -> None:
        self._args = args
        raise_if_any(Problem("--grid", "give a key and its values", grid) for grid in args.grid if len(grid) < 2)
        self._grid: dict[str, Sequence[str]] = {key.replace("-", "_"): values for key, *values in args.grid}
        self._known, self.methods = _asked(args)  # those that were asked for: the baseline first
        test = (args.test_dataset, args.test_path) if args.test_dataset else None
        self.setup = Setup(args.config, [*options, *QUIET, "--validator.enable"], args.processes, test)
        self._check()
        self._dims = self.setup.dims()
        self.cell = cache(self._cell)
        for method in self.methods:
            self.cell(method, ())

    def tuned(self) -> list[Method]:
        """The methods whose settings are chosen out of the grid. A control takes those of the method it is like."""
        pairs = [(self._known.get(method.like, method), method) for method in self.methods]
        return list(dict.fromkeys(own for own, method in pairs if method.tuned_over(own.tuned_over(self._grid))))

    def points(self, method: Method) -> list[Point]:
        """The points of a method's grid."""
        grid = method.tuned_over(self._grid)
        return [tuple(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def chosen(self, method: Method, chosen: Mapping[Method, Point]) -> Point:
        """What was chosen for a method, or for the one it is like, without what its own options set."""
        point = chosen.get(self._known.get(method.like, method), ())
        return tuple((key, value) for key, value in point if key in method.tuned_over({key: [value]}))

    def run(self, method: Method, point: Point, seed: int) -> Run:
        """A method at a point of its grid, with one seed."""
        label, details = self.cell(method, point)
        folder = self._args.work_dir / "dump" / f"{slug(label)}-seed-{seed}"
        own = ["--debug.seed", str(seed), "--dump_folder", str(folder)]
        options = [*self._options(method, point), *own]
        return self.setup.run(label, options, settings={}, details={"seed": seed, **details})

    def _cell(self, method: Method, point: Point) -> tuple[str, dict[str, Any]]:
        """The label of a method at a point, and what its rows say besides."""
        config: Any = self.setup.load(self._options(method, point)).config
        student = Student(config)
        tokens_per_step = plan.tokens_per_step(config, self._dims.dp_replicate * self._dims.dp_shard)
        flops = 6.0 * student.num_matmul_params * tokens_per_step  # attention between tokens is not counted
        costs = active_cost(config, student, self._dims)
        if config.training.steps % max(config.validator.freq, 1):
            message = f"{method.name}: {config.training.steps} steps must be a multiple of it, to evaluate the last one"
            raise ConfigError(Problem("validator.freq", message, config.validator.freq))
        weight = config.let.weight if config.let.enable else None
        name = method.name if not weight else f"{method.name}@{weight:g}"
        settings = [(need, getattr(self._args, need)) for need in method.needs]
        settings += [(key, value) for key, value in point if key != WEIGHT]
        details = {
            "method": method.name,
            "weight": weight,
            "num_student_params": student.num_matmul_params,
            "num_teacher_params": costs.num_teacher_params,
            "tokens_per_step": tokens_per_step,
            "step_flops": flops,
            "active_flops": costs.overhead * flops,
            "preparation": self._preparation(method, config, tokens_per_step),
        }
        return f"{name} [{settings_text(settings)}]" if settings else name, details

    def _options(self, method: Method, point: Point = ()) -> list[str]:
        return [*method.defaults, *method.options, *(part for key, value in point for part in (f"--{key}", value))]

    def _preparation(self, method: Method, config: Any, tokens_per_step: int) -> dict[str, Any]:
        """What had to be done before the run: its FLOPs, the tokens that went through a model, and its seconds."""
        if "gstack_blocks" in method.needs:
            shallow = Student(self.setup.load(self._options(method), self._args.gstack_blocks).config)
            tokens = tokens_per_step * self._args.gstack_steps
            flops = 6.0 * shallow.num_matmul_params * tokens
            return {"what": "shallow model", "flops": flops, "tokens": tokens, "seconds": None}
        if (selection := data_selection.costs_file(getattr(config.dataloader, "dataset_path", None))).is_file():
            return {"what": "selection of documents", **json.loads(selection.read_text())}
        if config.let.enable and plan.teacher_terms(config.let) and config.let.teacher.features:
            features = Features(config.let.teacher.features)
            info = features.info
            layers = plan.all_teacher_layers(config, info.num_layers)
            aligned = config.let.token_alignment.enable  # the teacher's own tokens, if it has a tokenizer of its own
            length = teacher_seq_len(config, info) if aligned else features.settings["seq_len"]
            tokens = features.num_rows * length
            num_params = info.num_params_to(layers) - info.num_embedding_params
            return {"what": "stored states", "flops": 2.0 * num_params * tokens, "tokens": tokens, "seconds": None}
        return {"what": "nothing", "flops": 0.0, "tokens": 0, "seconds": 0.0}

    def _check(self) -> None:
        """ConfigError lists what keeps the runs from being compared, or else what is wrong with any of them."""
        config: Any = self.setup.load([]).config
        if not isinstance(config.validator, TwoSplitValidator.Config):
            message = 'missing; name the dataset that results are read on ("text_files" with --test-path, for your own)'
            raise ConfigError(Problem("--test-dataset", message))
        problems, steps = [], config.training.steps
        if config.checkpoint.initial_load_path:
            message = "a suite starts from the initial weights of each seed, not from a checkpoint; leave it out"
            problems.append(Problem("checkpoint.initial_load_path", message, config.checkpoint.initial_load_path))
        if steps % max(config.validator.freq, 1):
            message = f"training.steps = {steps} must be a multiple of it: the last step is to be evaluated"
            problems.append(Problem("validator.freq", message, config.validator.freq))
        choices, results = (asdict(split) for split in (config.validator.dataloader, config.validator.test))
        if choices == results | {"infinite": choices.get("infinite")}:
            message = "is also the split that choices are made on, validator.dataloader; name another"
            problems.append(Problem("--test-dataset", message, self._args.test_dataset))
        found = f"signal = {config.let.signal!r}, control = {config.let.control!r}"
        names = {name for method in self.methods for name in (method.name, method.like)}
        if "let" in names and found != "signal = 'states', control = 'none'":
            problems.append(Problem("let", f"must be LET itself, which the others are compared with, not {found}"))
        whole = [m for m in self.tuned() if m.tuned_over(self._grid) == (m.grid or self._grid)]  # no key is given
        budgets = {method.name: len(self.points(method)) for method in whole}
        if len(set(budgets.values())) > 1:
            problems.append(Problem("--grid", f"every method gets the same budget; points of the grids: {budgets}"))
        for method in self.methods:
            absent = [f"--{need.replace('_', '-')}" for need in method.needs if getattr(self._args, need) is None]
            problems += [Problem(option, f"missing; {method.name} needs it") for option in absent]
        raise_if_any(problems)
        cells: list[tuple[Method, Point]] = [(method, ()) for method in [*self.methods, *self.tuned()]]
        for method in self.tuned():  # each value of a grid once, not each combination
            own = method.tuned_over(self._grid)
            cells += [(method, ((key, value),)) for key, values in own.items() for value in values]
        self.setup.check(list(dict.fromkeys(tuple(self._options(*cell)) for cell in cells)))


def settings_text(settings: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings)


def _asked(args: argparse.Namespace) -> tuple[dict[str, Method], list[Method]]:
    """All methods by name, and those that were asked for, the baseline first. ConfigError lists what is wrong."""
    known = dict(methods.METHODS) if args.methods_file is None else methods.read_file(args.methods_file)
    found, problems = [known[BASELINE]], []
    for text in args.methods:
        try:
            found.append(methods.parse(text, known))
        except ConfigError as error:
            problems += error.problems
    found = list(dict.fromkeys(found))
    names = Counter(method.asked or method.name for method in found)
    problems += [Problem("--methods", "several methods have this name", name) for name, num in names.items() if num > 1]
    raise_if_any(problems)
    return known, found
