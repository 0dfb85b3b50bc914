"""Result rows: one JSON object per line of a `.jsonl` file, appended and never edited, each with where it came from.

A row is one measured quantity of one run. Reports are made of rows alone.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli

import let_plugin
from let_plugin.bench.statistics import quantiles
from let_plugin.config.errors import ConfigError, Problem

Row = Mapping[str, Any]

# Kinds of rows.
THROUGHPUT = "throughput"
PROFILE = "profile"
CONVERGE = "converge"  # a run to its end: one method with one seed
CHOICE = "converge_choice"  # of a weight
DIVERGED = "converge_diverged"  # a run whose held-out loss became NaN; its value is the step

BASELINE = "standard"  # the method that the others are compared with
CONTROLS = ("labels", "random_teacher", "shuffled_targets")  # of LET, at its weight: what it does without knowledge

# Distributions whose versions a row carries, those of them that are installed.
_DISTRIBUTIONS = ("let-plugin", "torch", "torchtitan", "transformers")

# Field -> what it may be. None: the run was not in a checkout of this project; the seed was not fixed.
_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "command": (str,),
    "time": (str,),
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "versions": (dict,),
    "device": (str,),
    "config": (str,),
    "seed": (int, type(None)),
    "unit": (str,),
    "quantiles": (dict,),
    "values": (list,),
}


def provenance() -> dict[str, Any]:
    """Where a result comes from: time, commit, whether the package has been changed since, device, versions.

    The commit is that of this package's own checkout; None for an installed package, whatever repository it is in.
    `code` names the package's files as they are: other commits may have the same.
    """
    folder = Path(let_plugin.__file__).parent
    commit = dirty = code = None
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--", ".")
        dirty = None if changes is None else changes != ""
        code = _git(folder, "rev-parse", "HEAD:./")
        if dirty:
            content = f"{code}{changes}{_git(folder, 'diff', 'HEAD', '--', '.')}"
            code = hashlib.sha256(content.encode()).hexdigest()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "dirty": dirty,
        "code": code and code[:12],
        "device": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "versions": {name: v for name in _DISTRIBUTIONS if (v := _version(name)) is not None},
    }


def fingerprint(origin: Mapping[str, Any], *content: Any) -> str:
    """Names what may be compared: the same content (JSON), and the same code, versions and device.

    Args:
        origin: `provenance()`.
        content: What else must be the same.
    """
    fixed = {key: origin[key] for key in ("code", "versions", "device")}
    return hashlib.sha256(json.dumps([*content, fixed], sort_keys=True).encode()).hexdigest()[:12]


def command_line(program: str, argv: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join([program, *argv])


def row(
    kind: str,
    *,
    command: str,
    config: str,
    seed: int | None,
    unit: str,
    values: Sequence[float],
    origin: Mapping[str, Any],
    **details: Any,
) -> dict[str, Any]:
    """A row.

    Args:
        kind: What has been measured ("throughput").
        command: The command that measured it.
        config: The run's full effective configuration as TOML; paths in this package's folder become relative to what
            it lies in, which is nobody's business.
        seed: Its seed; None if it was not fixed.
        unit: Of the values.
        values: The raw measurements, at least one.
        origin: `provenance()`, of before the run.
        details: What else the kind of row has.
    """
    config = config.replace(f"{Path(let_plugin.__file__).parent.parent}/", "")
    fields = {"kind": kind, "command": command, **origin, "config": config, "seed": seed, "unit": unit}
    return {**fields, "quantiles": quantiles(values), "values": list(values), **details}


def append(path: Path, new: Mapping[str, Any]) -> None:
    """Adds a row to a file, which is made if it is missing. What is there is left as it is.

    AssertionError for a row that `read` would refuse.
    """
    assert not (problems := _problems(new)), problems
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(new, allow_nan=False) + "\n")  # in one piece: a killed suite leaves no part of a row
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, in order; none if there is no such file. ConfigError lists every line that is no row."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    problems: list[Problem] = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(str(path), f"cannot be read: {error}")) from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            remedy = "a write that was cut off, or another kind of file? remove the line, or choose another file"
            problems.append(Problem(where, f"not JSON ({error}); {remedy}"))
            continue
        if not isinstance(content, dict):
            problems.append(Problem(where, "expected a JSON object"))
            continue
        problems += [Problem(f"{where}: {field}", message) for field, message in _problems(content)]
        found.append(content)
    if problems:
        raise ConfigError(problems)
    return found


def _problems(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, what is wrong with it), of all fields."""
    problems = []
    for name, types in _FIELDS.items():
        if name not in content:
            problems.append((name, "missing"))
        elif not isinstance(content[name], types) or (isinstance(content[name], bool) and bool not in types):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            problems.append((name, f"expected {expected}, got {type(content[name]).__name__}"))
    if problems:
        return problems
    try:
        datetime.strptime(content["time"], "%Y-%m-%dT%H:%M:%S%z")
    except ValueError as error:
        problems.append(("time", str(error)))
    try:
        tomli.loads(content["config"])
    except tomli.TOMLDecodeError as error:
        problems.append(("config", f"not valid TOML: {error}"))
    values = content["values"]
    if not values or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        problems.append(("values", "expected finite numbers, at least one"))
    elif not _agree(content["quantiles"], values):
        problems.append(("quantiles", "are not those of the values; rows are not edited by hand"))
    return problems


def _agree(stated: Mapping[str, Any], values: Sequence[float]) -> bool:
    try:
        expected = quantiles(values, [float(p) for p in stated])
    except ValueError:
        return False
    return bool(expected) and all(
        isinstance(q, int | float) and math.isclose(q, e, rel_tol=1e-9, abs_tol=1e-12)
        for q, e in zip(stated.values(), expected.values(), strict=True)
    )


def _git(folder: Path, *args: str) -> str | None:
    """What git prints; None if it fails or is not there."""
    try:
        result = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
