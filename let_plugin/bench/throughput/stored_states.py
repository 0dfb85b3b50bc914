"""`python -m let_plugin.bench.throughput.stored_states REQUEST.json`: writes the states that a run is to read.

The export is let-teacher's, in a process of its own, for its teacher may be a random one.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

from let_plugin.bench import processes, rows
from let_plugin.bench.throughput.random_teacher import RandomTeacher
from let_plugin.preflight import export
from let_plugin.teacher.stored.features import MANIFEST, Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """An export.

    Attributes:
        config: TOML file, complete, of the run with the teacher.
        folder: Where the states go.
        data_parallel_degree: Of the run.
        out: Where the time that it took goes, as JSON.
        teacher: Fields of the random teacher that the configuration names, if it does.
    """

    config: str
    folder: str
    data_parallel_degree: int
    out: str
    teacher: dict[str, int] | None = None


def make(config: str, teacher: RandomTeacher | None, *, label: str, data_parallel_degree: int, work: Path) -> Path:
    """Writes the states of a run, unless this code has written them already; one that was broken off goes on.

    Args:
        config: The run's full configuration, with the teacher, as TOML.
        teacher: The random teacher that it names, if it does.
        label: What it is for, for messages.
        data_parallel_degree: Of the run.
        work: Folder for logs and states.

    Returns:
        The folder with the states.

    Raises:
        RunFailedError: If the export fails.
    """
    fields = None if teacher is None else teacher.as_dict()
    folder = work / rows.fingerprint(rows.provenance(), config, fields, data_parallel_degree)
    if (folder / MANIFEST).exists() and Manifest.read(folder).result is not None:
        return folder
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{folder.name}.toml"
    file.write_text(config)
    request = Request(
        config=str(file),
        folder=str(folder),
        data_parallel_degree=data_parallel_degree,
        out=str(work / f"{folder.name}.json"),
        teacher=fields,
    )
    took = processes.run_module(
        "let_plugin.bench.throughput.stored_states", request, what=f"states for {label}", num_processes=1
    )
    print(f"stored the teacher's states for {label} ({took['seconds']:.0f} s)", flush=True)
    return folder


def main(argv: list[str]) -> None:
    request = Request(**json.loads(Path(argv[0]).read_text()))
    if request.teacher is not None:
        RandomTeacher(**request.teacher).register()
    started = time.perf_counter()
    degree = str(request.data_parallel_degree)
    export.main([request.config, "--out", request.folder, "--data-parallel-degree", degree])
    Path(request.out).write_text(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1:])
