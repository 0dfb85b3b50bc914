"""Rows of downstream tasks on the page: scores by task and checkpoint, beside each other."""

from collections.abc import Sequence

from let_plugin.bench.page.parts import Row, Section, Table, origin, plural

KIND = "eval"


def sections(found: Sequence[Row]) -> list[Section]:
    """One section, with a table for each way to evaluate: what is not in one table is not to be compared."""
    if not found:
        return []
    tables = []
    for how in dict.fromkeys(map(_how, found)):
        rows = [row for row in found if _how(row) == how]
        lines = [
            [task, row["checkpoint"], metric, _score(row["results"][task], metric)]
            for task in dict.fromkeys(task for row in rows for task in row["results"])
            for row in rows
            for metric in _metrics(row["results"].get(task, {}))
        ]
        tables.append(
            Table(
                caption=f"Scores, {how}",
                header=["task", "checkpoint", "metric", "score"],
                lines=lines,
                notes=["lm-eval's own metrics; after the sign its standard error over documents.", origin(rows)],
            )
        )
    return [Section(anchor="downstream", title="Downstream tasks", origin=origin(found), tables=tables, rows=found)]


def _how(row: Row) -> str:
    limit = "" if row["limit"] is None else f", of the first {plural(row['limit'], 'document')} of a task alone"
    return f"{plural(row['num_fewshot'], 'example')} in the prompt, {row['max_length']:,} tokens at most{limit}"


def _metrics(scores: Row) -> list[str]:
    return [name for name in scores if not name.endswith("_stderr")]


def _score(scores: Row, metric: str) -> str:
    error = scores.get(f"{metric}_stderr")
    return f"{scores[metric]:.4f}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}")
