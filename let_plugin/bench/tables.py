"""`let-bench table`: the tables of rows that are there, as the commands that measured them print them."""

from collections.abc import Sequence
from pathlib import Path

from let_plugin.bench import rows, summary
from let_plugin.bench.converge import curves
from let_plugin.bench.converge import table as convergence_table
from let_plugin.config.errors import ConfigError, Problem


def text(files: Sequence[Path]) -> str:
    """A table for each suite in the files, in order.

    Raises:
        ConfigError: If a file is missing, holds something else than rows, or has no suite that can be shown.
    """
    problems = [Problem("ROWS.jsonl", "no such file", str(file)) for file in files if not file.is_file()]
    if problems:
        raise ConfigError(problems)
    parts = []
    for file in files:
        found = rows.read(file)
        suites = dict.fromkeys((row["kind"], row["suite"]) for row in found if "suite" in row)
        own = [_table(file, found, kind, suite) for kind, suite in suites]
        if not any(own):
            kinds = ", ".join(sorted({row["kind"] for row in found})) or "no rows at all"
            message = f"no complete pair of throughput runs and no results of a convergence suite in it ({kinds})"
            raise ConfigError(Problem("ROWS.jsonl", message, str(file)))
        parts += [table for table in own if table]
    return "\n\n".join(parts)


def _table(file: Path, found: Sequence[rows.Row], kind: str, suite: str) -> str:
    """Empty where there is nothing to show, or another kind of the suite's rows shows it."""
    if kind == "throughput":
        measured = summary.by_label(found, suite)
        return summary.table(file, suite) if all(measured.values()) else ""
    if kind == curves.KIND:
        return convergence_table.of_rows([row for row in found if row.get("suite") == suite])
    return ""
