"""Result rows: one JSON object per line of a `.jsonl` file, appended and never edited, each with where it came from."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import let_plugin
from let_plugin.config.errors import Problem, raise_if_any

Row = Mapping[str, Any]

# Kinds of rows.
THROUGHPUT = "throughput"
PROFILE = "profile"
CONVERGE = "converge"  # a run to its end: one method with one seed
CHOICE = "converge_choice"  # of a weight
DIVERGED = "converge_diverged"  # a run whose held-out loss became NaN; its value is the step

BASELINE = "standard"  # the method that the others are compared with
DISTILLATION = ("rkd", "salt")  # and these, and those whose names begin so
CONTROLS = ("labels", "random_teacher", "shuffled_targets")  # of LET, at its weight: what it does without knowledge

_DISTRIBUTIONS = ("let-plugin", "torch", "torchtitan", "transformers")
_REQUIRED = {"kind", "command", "time", "commit", "versions", "device", "config", "seed", "unit", "values"}


def provenance() -> dict[str, Any]:
    """Where a result comes from: time, commit, whether the package has changed since, its code, device, versions.

    The commit is that of this package's own checkout; None for an installed package. `code` is a hash of its modules.
    """
    from torch.backends.cpu import get_cpu_capability  # imports torch, which a table does without

    folder = Path(let_plugin.__file__).parent
    is_checkout = _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _git(folder, "rev-parse", "--short", "HEAD") if is_checkout else None,
        "dirty": _git(folder, "status", "--porcelain", "--", ".") != "" if is_checkout else None,
        "code": hashlib.sha256(b"".join(f.read_bytes() for f in sorted(folder.rglob("*.py")))).hexdigest()[:12],
        "device": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, {get_cpu_capability()}",
        "versions": {name: version(name) for name in _DISTRIBUTIONS if any(distributions(name=name))},
    }


def fingerprint(origin: Mapping[str, Any], *content: Any) -> str:
    """Names what may be compared: the same content (JSON), and the same code, versions and device of `provenance()`."""
    fixed = {key: origin[key] for key in ("code", "versions", "device")}
    return hashlib.sha256(json.dumps([*content, fixed], sort_keys=True).encode()).hexdigest()[:12]


def command_line(program: str, argv: Sequence[str]) -> str:
    """A command as one would type it."""
    return without_checkout(f"{program} {shlex.join(argv)}")


def without_checkout(text: str) -> str:
    """Makes absolute paths inside the checkout relative, so that rows do not have the paths of a machine."""
    return text.replace(f"{Path(let_plugin.__file__).parent.parent}/", "")


def row(kind: str, origin: Mapping[str, Any], *, config: str, **fields: Any) -> dict[str, Any]:
    """A row: `values`, in a `unit`, of what a `command` has measured, and the fields of its kind.

    `origin` is the `provenance()` of before the run, `config` its full effective configuration as TOML, `seed` its seed
    (None: not fixed).
    """
    return {"kind": kind, **origin, "config": without_checkout(config), **fields}


def append(path: Path, new: Mapping[str, Any]) -> None:
    """Adds a row to a file, which is made if it is missing. What is there is left as it is. ValueError for NaN."""
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
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            found.append(json.loads(line))
            if missing := _REQUIRED - found[-1].keys():
                problems.append(Problem(f"{path}:{number}", f"not a row: it has no {', '.join(sorted(missing))}"))
        except (json.JSONDecodeError, AttributeError):
            problems.append(Problem(f"{path}:{number}", "not a JSON object; if a write was cut off, remove the line"))
    raise_if_any(problems)
    return found


def _git(folder: Path, *args: str) -> str | None:
    """What git prints; None if it fails or is not there."""
    try:
        result = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
