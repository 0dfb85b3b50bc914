"""One run of a convergence suite: what is to be run, what it costs before it starts, and the row that comes of it."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from let_plugin.bench import rows
from let_plugin.bench.converge import stacking
from let_plugin.bench.converge.observe import Request
from let_plugin.bench.processes import run_module, slug
from let_plugin.config import load as toml_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What had to be done before the run.

    Attributes:
        what: "nothing", "stored states", "selection of documents" or "shallow model".
        flops: Its floating-point operations.
        tokens: Tokens that went through a model.
        seconds: How long it took; None: not known, or not yet.
    """

    what: str = "nothing"
    flops: float = 0.0
    tokens: int = 0
    seconds: float | None = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shallow:
    """The model that grows into the student: its full configuration (TOML), and how many blocks it has."""

    config: str
    num_blocks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        method: Name of the method.
        weight: Its `let.weight`; None: it has none.
        variant: What tells it apart from the same method with other resources; empty: it needs none.
        seed: Of the run, `debug.seed`.
        config: Full effective configuration, TOML.
        preparation: What had to be done before.
        shallow: What is trained first, if anything.
        tokens_per_step: Of the whole job.
        step_flops: FLOPs of a plain step.
        active_flops: FLOPs that a step costs more while LET, or the method in its place, is active.
        details: What its row says besides.
    """

    method: str
    weight: float | None
    variant: str
    seed: int
    config: str
    preparation: Preparation
    shallow: Shallow | None
    tokens_per_step: int
    step_flops: float
    active_flops: float
    details: Mapping[str, Any]

    @property
    def label(self) -> str:
        return label(self.method, self.weight, self.variant)

    def id(self, origin: Mapping[str, Any], num_processes: int) -> str:
        """The same for the same run of the same code on the same device."""
        content = dataclasses.asdict(self) | {"details": dict(self.details)}
        return rows.fingerprint(origin, content, num_processes)


def label(method: str, weight: float | None, variant: str) -> str:
    """A method with its weight, as one asks for it, and with what else makes it what it is."""
    text = method if weight is None else f"{method}@{weight:g}"
    return f"{text} [{variant}]" if variant else text


def execute(run: Run, folder: Path, num_processes: int) -> dict[str, Any]:
    """The run in a process of its own, after what it grows from. RunFailedError if one fails; it starts from zero.

    Returns:
        What was observed, and `preparation`.
    """
    name, preparation, text = f"{slug(run.label)}-seed-{run.seed}", run.preparation, run.config
    scratch = folder / f"{name}-shallow"
    for path in (scratch, _dump_folder(run.config)):
        shutil.rmtree(path, ignore_errors=True)  # of a run that was broken off
    if run.shallow is not None:
        shallow = tomli.loads(run.shallow.config) | {"dump_folder": str(scratch)}
        what = f"{run.label} seed {run.seed}, the shallow model"
        observed = _observe(tomli_w.dumps(shallow), scratch, what, num_processes, run.shallow.num_blocks)
        started = time.perf_counter()
        steps, checkpoints = shallow["training"]["steps"], shallow["checkpoint"]["folder"]
        config = toml_config.load(scratch.with_name(f"{scratch.name}.toml"), []).config  # of the student, but for depth
        initial = scratch.absolute() / "initial"
        stacking.grow(config, str(scratch / checkpoints / f"step-{steps}"), initial)
        seconds = observed["curve"]["seconds"][-1] + time.perf_counter() - started
        preparation = dataclasses.replace(preparation, seconds=seconds)
        deep = tomli.loads(text)
        deep["checkpoint"] |= {"enable": True, "load_only": True, "initial_load_path": str(initial)}
        text = tomli_w.dumps(deep)
    result = _observe(text, folder / name, f"{run.label} seed {run.seed}", num_processes, None)
    shutil.rmtree(scratch, ignore_errors=True)
    return result | {"preparation": dataclasses.asdict(preparation)}


def row(
    run: Run, result: Mapping[str, Any], origin: Mapping[str, Any], command: str, details: Mapping[str, Any]
) -> dict[str, Any]:
    """The row of a run. FLOPs and seconds of its curve have the preparation in them, tokens have not."""
    curve, preparation = dict(result["curve"]), result["preparation"]
    active = curve.pop("active_steps")
    before = preparation["seconds"] or 0.0
    full_curve = {
        "step": curve["step"],
        "tokens": [step * run.tokens_per_step for step in curve["step"]],
        "flops": [
            preparation["flops"] + run.step_flops * step + run.active_flops * num_active
            for step, num_active in zip(curve["step"], active, strict=True)
        ],
        "seconds": [before + seconds for seconds in curve["seconds"]],
        "validation_loss": curve["validation_loss"],
        "test_loss": curve["test_loss"],
    }
    return rows.row(
        rows.CONVERGE,
        command=command,
        config=run.config,
        seed=run.seed,
        unit="nats/token",
        values=[full_curve["test_loss"][-1]],
        origin=origin,
        label=run.label,
        method=run.method,
        weight=run.weight,
        curve=full_curve,
        final_validation_loss=full_curve["validation_loss"][-1],
        final_test_loss=full_curve["test_loss"][-1],
        active_steps=active[-1],
        tokens_per_step=run.tokens_per_step,
        preparation=preparation,
        **{k: v for k, v in result.items() if k not in ("curve", "preparation")},
        **run.details,
        **details,
    )


def _observe(text: str, stem: Path, what: str, num_processes: int, num_blocks: int | None) -> dict[str, Any]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    config = stem.parent / f"{stem.name}.toml"
    config.write_text(text)
    request = Request(config=str(config), out=str(stem.parent / f"{stem.name}.json"), num_blocks=num_blocks)
    return run_module("let_plugin.bench.converge.observe", request, what=what, num_processes=num_processes)


def _dump_folder(config: str) -> Path:
    return Path(tomli.loads(config)["dump_folder"])
