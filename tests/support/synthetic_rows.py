"""Rows of runs that nobody made, with known ratios: what a report makes of them can be checked."""

import functools
import math
import random

from let_plugin.bench import rows
from let_plugin.bench.converge.curves import KIND, Point, Run

MIB = 2**20
NUM_STUDENT_PARAMS = 1_000_000


def throughput(path, *, pairs=7, noise=0.0, name="a CPU", suite="s"):
    """Plain, two active teachers and a stopped one, at two batch sizes. Returns nothing.

    A teacher of share p costs 0.4 p of the plain step time, at batch 2; half as much at batch 4. Stopped costs nothing.
    """
    generator = random.Random(0)
    for pair in range(pairs):
        drift = 1 + 0.3 * pair  # a machine that gets slower: the ratios do not see it
        for batch in (2, 4):
            plain = f"plain batch {batch}"
            cases = [("plain", plain, 0.0, 0.0)]
            cases += [("active", f"active {share:.0%} batch {batch}", share, share) for share in (0.05, 0.2)]
            cases.append(("stopped", f"stopped batch {batch}", 0.2, 0.0))
            for case, label, teacher, paid in cases:
                seconds = drift * batch * (1 + 0.4 * paid * 2 / batch) * math.exp(generator.gauss(0, noise))
                _append(path, case, label, plain, suite, pair, batch, seconds, teacher, paid, name)


def profile(path, *, suite="s"):
    parts = {"teacher forward": 0.1, "gradient injection": 0.005}
    label = "active 5% batch 2"
    _append(
        path, "active", label, "plain batch 2", suite, None, 2, 1.0, 0.05, 0.05, "a CPU", kind="profile", parts=parts
    )


def _append(path, case, label, baseline, suite, pair, batch, seconds, teacher, paid, name, kind="throughput", **more):
    details = {
        "case": case,
        "label": label,
        "baseline": baseline,
        "suite": suite,
        "local_batch_size": batch,
        "seq_len": 128,
        "num_teacher_params": int(teacher * NUM_STUDENT_PARAMS),
        "num_student_params": NUM_STUDENT_PARAMS,
        "flop_bound": paid / 3,
        "memory_bound_bytes": int(paid * 40 * MIB),
        "run_steps": 100,
        "stop_step": 50,
        "num_processes": 1,
        "device_name": name,
        "tokens_per_second": batch * 128 / seconds,
        "peak_memory_bytes": {"resident": int((100 + 50 * paid) * MIB)},
        "peak_is_of_measured_steps": True,
    }
    if pair is not None:
        details["pair"] = pair
    append(path, kind, [seconds, seconds, 5 * seconds], "s/step", **details, **more)


def converge(path, *, seeds=5, methods=None, spread=0.01, suite="c"):
    """Losses that fall as 4 - log10(tokens) * speed-up: a method with speed-up 2 is where the baseline is, at half.

    Args:
        path: File of rows.
        seeds: How many.
        methods: Name -> its speed-up in tokens; it costs a tenth more FLOPs and time per token and 1.5 x the memory.
        spread: Of the loss, by seed: the same for all methods of a seed.
        suite: Name of the suite.
    """
    generator = random.Random(1)
    for seed in range(seeds):
        offset = generator.gauss(0, spread)
        for method, speed_up in (methods or {"standard": 1.0, "let@1": 2.0, "RKD": 1.0}).items():
            cost = 1.0 if method == "standard" else 1.1
            points = []
            for step in range(10, 201, 10):
                loss = 6 + offset - math.log10(step * 1000 * speed_up)
                if method == "RKD":
                    loss += generator.gauss(0, 0.05)
                points.append(
                    Point(
                        step=step,
                        tokens=1000 * step,
                        flops=6e9 * step * cost,
                        seconds=2.0 * step * cost,
                        validation_loss=loss + 0.1,
                        test_loss=loss,
                    )
                )
            run = Run(
                method=method,
                seed=seed,
                suite=suite,
                curve=tuple(points),
                peak_memory_bytes={"resident": int(100 * MIB * (1 if method == "standard" else 1.5))},
                final={"validation_loss": points[-1].validation_loss, "test_loss": points[-1].test_loss},
            )
            append(path, KIND, [points[-1].test_loss], "nats/token", seed=seed, device_name="a CPU", **run.details())


_origin = functools.cache(rows.provenance)


def append(path, kind, values, unit, seed=0, command="let-bench", config="[training]\nsteps = 12\n", **details):
    own = {"command": command, "config": config, "seed": seed, "unit": unit, "values": values, "origin": _origin()}
    rows.append(path, rows.row(kind, **own, **details))


def line(table, name):
    """A line of a page's table, by its first cell: column -> cell."""
    (cells,) = [cells for cells in table.lines if cells[0] == name]
    return dict(zip(table.header, cells, strict=True))


def finding(made, start):
    """What a section says in words, by how it begins."""
    return next(f for f in made.findings if f.text.startswith(start))
