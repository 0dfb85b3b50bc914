"""The runs of `let-bench converge`: which there are, each with its configuration and what it costs, all checked."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torchtitan.components.validate import Validator
from torchtitan.distributed import ParallelDims

from let_plugin.bench.converge import data_selection, methods, stacking
from let_plugin.bench.converge.methods import METHODS, Resources
from let_plugin.bench.converge.runs import Preparation, Run, Shallow, label
from let_plugin.bench.processes import launch_problems, slug
from let_plugin.bench.rows import BASELINE
from let_plugin.bench.throughput.costs import active_cost, step_flops
from let_plugin.config import load as toml_config
from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, lookup
from let_plugin.config.load import Loaded
from let_plugin.preflight import checks as preflight
from let_plugin.preflight.report import Student
from let_plugin.runtime.held_out import TwoSplitValidator
from let_plugin.teacher.retokenized import teacher_seq_len
from let_plugin.teacher.stored.features import Features, Manifest

LET = "let"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the command line.

    Attributes:
        methods: Names of methods, or name@weight.
        seeds: Of the results.
        tuning_seeds: Of the runs that weights are chosen by.
        weights: To choose from, for each method with a weight of its own; none: nothing is tuned.
        test_dataset: Name of the test split's dataset; empty: the configuration has a TwoSplitValidator.
        test_path: Its files, if the name does not say so.
        resources: What some methods need.
        num_processes: Of a run.
        out: Result file.
        work: Folder for logs and whatever else runs write.
    """

    methods: Sequence[str]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    weights: Sequence[float]
    test_dataset: str
    test_path: str
    resources: Resources
    num_processes: int
    out: Path
    work: Path

    def check(self) -> None:
        """ConfigError with all that is wrong."""
        problems = []
        for name in self.methods:
            try:
                parse(name)
            except ConfigError as error:
                problems += error.problems
        for option, values in (
            ("--methods", self.methods),
            ("--seeds", self.seeds),
            ("--tuning-seeds", self.tuning_seeds),
            ("--weights", self.weights),
        ):
            problems += [Problem(option, "given twice", v) for v in dict.fromkeys(values) if values.count(v) > 1]
        for option, seeds in (("--seeds", self.seeds), ("--tuning-seeds", self.tuning_seeds)):
            problems += [Problem(option, "must be at least 0", seed) for seed in seeds if seed < 0]
        problems += [Problem("--weights", "must be more than 0", w) for w in self.weights if not 0 < w < math.inf]
        if self.num_processes < 1:
            problems.append(Problem("--processes", "must be at least 1", self.num_processes))
        problems += launch_problems(self.out, self.work)
        if problems:
            raise ConfigError(problems)


def parse(name: str) -> tuple[str, float | None]:
    """The method and the weight of name or name@weight. ConfigError if there is no such method."""
    method, at, text = name.partition("@")
    found = lookup(METHODS.get, method, key="--methods")
    if not at:
        return method, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if found.weight == "none" or not 0 < weight < math.inf:
        message = "has no weight" if found.weight == "none" else "the weight must be a number, more than 0"
        raise ConfigError(Problem("--methods", f"{method} {message}" if found.weight == "none" else message, name))
    return method, weight


class Planner:
    """The runs of a suite, checked. ConfigError lists all that is wrong with any of them.

    Attributes:
        base: The user's configuration with the two splits, and nothing that disturbs a comparison.
        text: The same as TOML.
    """

    def __init__(self, loaded: Loaded, options: Options) -> None:
        self._loaded = loaded
        self._options = options
        self.base = _prepared(loaded, options)
        self.text = toml_config.dump(replace(loaded, config=self.base))
        problems: list[Problem] = []
        for method, weight in dict.fromkeys([*self.entries(), *((method, None) for method in self.tuned())]):
            try:
                self._check(method, weight)
            except ConfigError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise ConfigError(problems)
        self._dims = ParallelDims.from_config(self.base.parallelism, options.num_processes)

    def entries(self) -> list[tuple[str, float | None]]:
        """What was asked for, standard first: it is what the others are compared with."""
        asked = [parse(name) for name in self._options.methods]
        return [(BASELINE, None), *(entry for entry in asked if entry != (BASELINE, None))]

    def tuned(self) -> list[str]:
        """The methods whose weight is chosen out of the grid. LET's is also that of its controls."""
        if not self._options.weights:
            return []
        open_ = [
            lookup(METHODS.get, method, key="--methods").weight for method, weight in self.entries() if weight is None
        ]
        own = [m for m, w in self.entries() if w is None and lookup(METHODS.get, m, key="--methods").weight == "own"]
        return list(dict.fromkeys([*([LET] if "let" in open_ else []), *own]))

    def tuning_runs(self) -> list[Run]:
        return [self.plan(*cell, seed) for seed in self._options.tuning_seeds for cell in self._tuned_cells()]

    def cells(self, chosen: Mapping[str, float]) -> list[tuple[str, float | None]]:
        """(method, weight) of the results, each once, in the order in which they were asked for."""
        cells = []
        for method, weight in self.entries():
            kind = lookup(METHODS.get, method, key="--methods").weight
            if kind != "none" and weight is None:
                weight = chosen.get(LET if kind == "let" else method, self._configured(method).let.weight)
            cells.append((method, weight))
        return list(dict.fromkeys(cells))

    def plan(self, method: str, weight: float | None, seed: int) -> Run:
        """A run. The planner's checks have passed."""
        config = self._configured(method, weight)
        config.debug.seed = seed
        variant_of = lookup(METHODS.get, method, key="--methods").variant
        variant = "" if variant_of is None else variant_of(self._options.resources)
        name = f"{slug(label(method, weight, variant))}-seed-{seed}"
        config.dump_folder = str(self._options.work / "dump" / name)
        student = Student(config)
        per_step = plan.tokens_per_step(config, self._dims.dp_replicate * self._dims.dp_shard)
        flops = step_flops(student, per_step)
        costs = active_cost(config, student, self._dims) if config.let.enable else None
        preparation, shallow = self._preparation(method, config, per_step)
        validator: Any = config.validator
        return Run(
            method=method,
            weight=weight,
            variant=variant,
            seed=seed,
            config=self._dump(config),
            preparation=preparation,
            shallow=shallow,
            tokens_per_step=per_step,
            step_flops=flops,
            active_flops=0.0 if costs is None else costs.overhead * flops,
            details={
                "num_student_params": student.num_matmul_params,
                "num_teacher_params": 0 if costs is None else costs.num_teacher_params,
                "splits": {"validation": _split(validator.dataloader), "test": _split(validator.test)},
            },
        )

    def _tuned_cells(self) -> list[tuple[str, float | None]]:
        return [(method, weight) for method in self.tuned() for weight in self._options.weights]

    def _configured(self, method: str, weight: float | None = None) -> Any:
        config = copy.deepcopy(self.base)
        methods.configure(config, method, weight, self._options.resources)
        return config

    def _check(self, method: str, weight: float | None) -> None:
        config = self._configured(method, weight)
        if method == "gstack":
            stacking.shorten(self._configured(method), self._options.resources.shallow_blocks or 0)
        if method == "miniplm":
            data_selection.read_costs(self._selected())
        replace(self._loaded, config=config).apply(preflight.run)

    def _preparation(self, method: str, config: Any, tokens_per_step: int) -> tuple[Preparation, Shallow | None]:
        if method == "miniplm":
            costs = data_selection.read_costs(self._selected())
            return Preparation(what="selection of documents", **costs), None
        if method == "gstack":
            shallow = copy.deepcopy(config)
            blocks, steps = self._options.resources.shallow_blocks, self._options.resources.shallow_steps
            assert blocks is not None and steps is not None
            shallow.training.steps = shallow.validator.freq = steps
            shallow.checkpoint.enable, shallow.checkpoint.async_mode = True, "disabled"
            text = self._dump(shallow)
            stacking.shorten(shallow, blocks)
            flops = step_flops(Student(shallow), tokens_per_step) * steps
            tokens = tokens_per_step * steps
            preparation = Preparation(what="shallow model", flops=flops, tokens=tokens, seconds=None)
            return preparation, Shallow(config=text, num_blocks=blocks)
        if config.let.enable and config.let.target == "teacher" and config.let.teacher.features:
            features = Features(config.let.teacher.features)
            info = features.info
            layers = plan.teacher_layers(plan.pairs(config, info.num_layers))
            result = Manifest.read(features.folder).result or {}
            alignment = config.let.token_alignment  # the teacher's own tokens, if it has a tokenizer of its own
            length = teacher_seq_len(config, info) if alignment.enable else features.settings["seq_len"]
            tokens = result["num_rows"] * length
            num_params = info.num_params_to(layers) - info.num_embedding_params
            return Preparation(what="stored states", flops=2.0 * num_params * tokens, tokens=tokens, seconds=None), None
        return Preparation(), None

    def _selected(self) -> Path:
        assert self._options.resources.selected_text is not None
        return self._options.resources.selected_text

    def _dump(self, config: Any) -> str:
        return toml_config.dump(replace(self._loaded, config=config))


def _prepared(loaded: Loaded, options: Options) -> Any:
    """A copy of the user's configuration: both splits evaluated, at the last step too, and nothing that disturbs."""
    config: Any = copy.deepcopy(loaded.config)
    config.validator.enable = True
    config.validator = _two_splits(config.validator, options)
    starts_elsewhere = config.checkpoint.enable and config.checkpoint.initial_load_path
    # Of the user's own settings nothing is left: no run is to write or read anything that another one does not.
    config.checkpoint = type(config.checkpoint)(enable=False)
    config.profiler.enable_profiling = config.profiler.enable_memory_snapshot = False
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.debug.enable_structured_logging = False
    problems = []
    if starts_elsewhere:
        message = "a suite starts from the initial weights of each seed, not from a checkpoint; leave it out"
        problems.append(Problem("checkpoint.initial_load_path", message, starts_elsewhere))
    if config.training.steps % max(config.validator.freq, 1):
        message = f"training.steps = {config.training.steps} must be a multiple of it: the last step is to be evaluated"
        problems.append(Problem("validator.freq", message, config.validator.freq))
    if _split(config.validator.dataloader) == _split(config.validator.test):
        message = "is also the split that choices are made on, validator.dataloader; name another"
        problems.append(Problem("--test-dataset", message, options.test_dataset))
    if problems:
        raise ConfigError(problems)
    return config


def _two_splits(validator: Any, options: Options) -> Any:
    if isinstance(validator, TwoSplitValidator.Config) and not options.test_dataset:
        return validator
    if not options.test_dataset:
        message = 'missing; name the dataset that results are read on ("text_files" with --test-path, for your own)'
        raise ConfigError(Problem("--test-dataset", message))
    loader = validator.dataloader
    if type(validator) not in (Validator.Config, TwoSplitValidator.Config) or not hasattr(loader, "dataset_path"):
        message = "--test-dataset goes with torchtitan's own validator and text; else set a TwoSplitValidator yourself"
        raise ConfigError(Problem("validator", message))
    test = replace(loader, dataset=options.test_dataset, dataset_path=options.test_path or None)
    values = {field.name: getattr(validator, field.name) for field in fields(validator)}
    return TwoSplitValidator.Config(**values | {"test": test})


def _split(loader: Any) -> dict[str, Any]:
    """What a data loader reads, as JSON values."""
    values = {key: value for key, value in dataclasses.asdict(loader).items() if key != "infinite"}
    plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in values.items()}
