"""Breaks one line of the package at a time and records which test notices.

    python -m tests.mutations              all of tests/mutations.toml; writes tests/mutations.md
    python -m tests.mutations 3 17         the third and the seventeenth only; writes nothing

Each mutation is applied to a copy of the checkout. The named tests must pass before anything is
broken, and at least one must fail after it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests/mutations.md"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "-rf"]


@dataclass(frozen=True)
class Mutation:
    """One broken line."""

    what: str
    file: str  # in let_plugin/
    old: str  # occurs once in the file
    new: str
    tests: str  # arguments of pytest: the tests that are expected to notice


MUTATIONS = [Mutation(**entry) for entry in tomllib.loads((ROOT / "tests/mutations.toml").read_text())["mutation"]]


def pytest(folder: Path, tests: str) -> tuple[bool, str]:
    """Whether the tests pass in `folder`, and the first that fails."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *shlex.split(tests)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode in (0, 1, 2), result.stdout[-2000:] + result.stderr[-2000:]
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, flags=re.M)
    return result.returncode == 0, failed.group(1) if failed else ""


def check(folder: Path, mutation: Mutation) -> str:
    """The test that notices the mutation, or "" if none does."""
    path = folder / "let_plugin" / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file}: {text.count(mutation.old)} places have {mutation.old!r}"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        return pytest(folder, mutation.tests)[1]
    finally:
        path.write_text(text)


def main(numbers: list[int]) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__"))
        chosen = [(i, m) for i, m in enumerate(MUTATIONS, 1) if not numbers or i in numbers]
        for tests in dict.fromkeys(mutation.tests for _, mutation in chosen):
            passed, failed = pytest(folder, tests)
            if not passed:
                print(f"{failed} fails before anything is broken")
                return 1
        rows = []
        for number, mutation in chosen:
            noticed = check(folder, mutation)
            rows.append((number, mutation, noticed))
            print(f"{number:2d} {mutation.what}: {noticed or 'NOT CAUGHT'}", flush=True)
    caught = sum(bool(noticed) for *_, noticed in rows)
    print(f"{caught} of {len(rows)} caught")
    if not numbers:
        lines = [
            "# Mutations",
            "",
            "`python -m tests.mutations` breaks one line at a time and runs the tests that should notice.",
            f"{caught} of {len(rows)} were caught.",
            "",
            "| | what breaks | line | becomes | caught by |",
            "| ---: | --- | --- | --- | --- |",
        ]
        for number, m, noticed in rows:
            old, new = (" ".join(s.split()).replace("|", "\\|") for s in (m.old, m.new))
            lines.append(f"| {number} | {m.what} | {m.file}: `{old}` | `{new}` | {noticed or '**none**'} |")
        TABLE.write_text("\n".join(lines) + "\n")
    return caught != len(rows)


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
