"""Runs in turn, each in a process of its own, until all that was asked for is in the result file.

A round measures every variant once (A B C, A B C, ...), so that what is compared is close in time. What a killed suite
has left in the file counts, by whole rounds: a round that was broken off is measured anew, under a new number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from let_plugin.bench import rows
from let_plugin.bench.processes import Progress, RunFailedError, Running, finish, slug
from let_plugin.bench.statistics import median
from let_plugin.bench.throughput.measure import Request
from let_plugin.bench.throughput.turns import take_turns


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a suite measures once per round.

    Attributes:
        label: Its name in the suite.
        config: Full effective configuration, TOML.
        seed: The configuration's.
        warmup: Steps that are not measured.
        total: Steps in all.
        is_active: Whether LET is active in the measured steps.
        teacher: Fields of the random teacher, if it has one.
        details: What its rows say besides.
    """

    label: str
    config: str
    seed: int | None
    warmup: int
    total: int
    is_active: bool | None
    teacher: dict[str, int] | None
    details: Mapping[str, Any]


def suite_id(runs: Sequence[Run], num_processes: int, origin: Mapping[str, Any], interleaved: bool = False) -> str:
    """Names what may be compared: the same runs, measured in the same way; the same code, versions and device."""
    content = [asdict(run) | {"details": dict(run.details)} for run in runs]
    return rows.fingerprint(origin, content, num_processes, interleaved)


def complete_rounds(found: Sequence[Mapping[str, Any]], suite: str, labels: Sequence[str]) -> list[int]:
    """Numbers of the suite's rounds in which every variant has been measured, in order."""
    measured: dict[int, set[str]] = {}
    for row in found:
        if row["kind"] == "throughput" and row.get("suite") == suite:
            measured.setdefault(row["pair"], set()).add(row["label"])
    return sorted(number for number, have in measured.items() if have >= set(labels))


def missing_rounds(found: Sequence[Mapping[str, Any]], suite: str, labels: Sequence[str], pairs: int) -> list[int]:
    """Numbers of the rounds that are still to be measured; behind all that the file knows, the broken ones too."""
    missing = pairs - len(complete_rounds(found, suite, labels))
    known = [row["pair"] for row in found if row["kind"] == "throughput" and row.get("suite") == suite]
    first = max(known, default=-1) + 1
    return list(range(first, first + max(missing, 0)))


def measure(
    runs: Sequence[Run],
    *,
    pairs: int,
    num_processes: int,
    out: Path,
    work: Path,
    command: str,
    profile: bool,
    interleave: bool,
) -> str:
    """Measures what is missing in `out`, and says how it goes. Returns the suite's id.

    Args:
        runs: Of a round.
        pairs: Rounds.
        num_processes: Of a run.
        out: Result file.
        work: Folder for logs.
        command: For the rows.
        profile: Also profile each run with a teacher.
        interleave: The runs of a round make their steps in turn, instead of one after the other.

    Raises:
        ConfigError: If `out` holds something else than rows.
        RunFailedError: If a run fails; what was measured before is in `out`.
    """
    origin = rows.provenance()
    suite = suite_id(runs, num_processes, origin, interleave)
    found = rows.read(out)
    labels = [run.label for run in runs]
    # What is started together, under which number; profiles have none.
    groups: list[tuple[int | None, list[Run]]] = []
    for pair in missing_rounds(found, suite, labels, pairs):
        groups += [(pair, list(runs))] if interleave else [(pair, [run]) for run in runs]
    num_known = len(complete_rounds(found, suite, labels))
    if num_known:
        print(f"{out} has {num_known} of {pairs} pairs already; another --out measures anew", flush=True)
    if profile:
        profiled = {row["label"] for row in found if row["kind"] == "profile" and row.get("suite") == suite}
        groups += [(None, [run]) for run in runs if run.is_active and run.label not in profiled]
    progress = Progress([run.label for _, group in groups for run in group])
    for number, group in groups:
        what = f"pair {number + 1}" if number is not None else "profile"
        origin = rows.provenance()
        if suite_id(runs, num_processes, origin, interleave) != suite:
            raise RunFailedError("let_plugin has changed since the suite began: what is measured now is other code")
        starts = [_starter(run, work / suite, what, num_processes) for run in group]
        results = take_turns(starts, seed=number or 0) if len(group) > 1 else [finish(starts[0](None))]
        for left, (run, result) in enumerate(zip(group, results, strict=True)):
            row = _row(run, result, origin, command) | {"suite": suite, "num_processes": num_processes}
            if number is not None:
                row |= {"pair": number, "interleaved": interleave}
            rows.append(out, row)
            speed = f"{row['tokens_per_second']:,.0f} tokens/s, {median(row['values']):.3f} s/step"
            progress.after(f"{what}, {run.label}: {speed}", num_more=len(group) - 1 - left)
    return suite


def _row(run: Run, result: dict[str, Any], origin: dict[str, Any], command: str) -> dict[str, Any]:
    seconds = result.pop("step_seconds")
    return rows.row(
        "profile" if "parts" in result else "throughput",
        command=command,
        config=run.config,
        seed=run.seed,
        unit="s/step",
        values=seconds,
        origin=origin,
        label=run.label,
        warmup_steps=run.warmup,
        tokens_per_second=result["tokens_per_step"] * len(seconds) / result["wall_seconds"],
        teacher=run.teacher,
        **result,
        **run.details,
    )


def _starter(run: Run, folder: Path, what: str, num_processes: int) -> Callable[[str | None], Running]:
    """Starts the run in a process of its own, or in `num_processes`, given where it gets its turns, if it takes any."""
    name = f"{slug(run.label)}-{what.replace(' ', '-')}"

    def start(turns: str | None) -> Running:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f"{name}.toml"
        config.write_text(run.config)
        request = Request(
            config=str(config),
            warmup=run.warmup,
            total=run.total,
            out=str(folder / f"{name}.json"),
            is_active=run.is_active,
            teacher=run.teacher,
            profile=what == "profile",
            turns=turns,
        )
        return Running("let_plugin.bench.throughput.measure", request, what=run.label, num_processes=num_processes)

    return start
