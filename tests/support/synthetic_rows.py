"""Rows of runs that nobody made, with known ratios: what tables and pages make of them can be checked."""

import functools
import math
import random

from let_plugin.bench import rows

MIB = 2**20
NUM_STUDENT_PARAMS = 1_000_000


def throughput(path, *, pairs=7, noise=0.0, shares=(0.05, 0.1, 0.2), **details):
    """Plain, active teachers and a stopped one. A teacher of share p costs 0.4 p of a plain step, stopped nothing."""
    generator = random.Random(0)
    cases = [("plain", "plain", 0.0, 0.0), *(("active", f"active {p:.0%}", p, p) for p in shares)]
    cases.append(("stopped", "stopped 10%", 0.1, 0.0))
    for pair in range(pairs):
        drift = 1 + 0.3 * pair  # a machine that gets slower: the ratios do not see it
        for case, label, teacher, paid in cases:
            seconds = drift * (1 + 0.4 * paid) * math.exp(generator.gauss(0, noise))
            values = [seconds, 0.9 * seconds, 5 * seconds]  # a slow step does not move the median
            own = {"case": case, "label": label, "num_teacher_params": int(teacher * NUM_STUDENT_PARAMS), "pair": pair}
            own |= {"flop_bound": paid / 3, "memory_bound_bytes": int(paid * 40 * MIB)}
            own |= {"peak_memory_bytes": {"resident": int((100 + 50 * paid) * MIB)}}
            append(path, rows.THROUGHPUT, values, **_THROUGHPUT | own | {"tokens_per_second": 256 / seconds} | details)


def profile(path, **details):
    own = {"label": "active 5%", "parts": {"teacher forward": 0.1, "gradient injection": 0.005}, "flop_bound": 0.02}
    append(path, rows.PROFILE, [1.0, 0.9, 5.0], **_THROUGHPUT | own | details)


def converge(path, *, seeds=5, methods=None, **details):
    """Losses that fall as 6 - log10(tokens x speed-up): a method with speed-up 2 is where the baseline is, at half.

    Each of `seeds` has an offset of its own, which its methods share. `methods`: label -> speed-up in tokens; a method
    costs a tenth more FLOPs and time per token, and 1.5 x the memory. `details` are fields of all rows.
    """
    generator = random.Random(1)
    for seed in range(seeds):
        offset = generator.gauss(0, 0.01)
        for label, speed_up in (methods or {"standard": 1.0, "let@1": 2.0, "rkd@1": 1.0}).items():
            method, _, weight = label.partition("@")
            cost = 1.0 if method == "standard" else 1.1
            noise = 0.05 if method == "rkd" else 0.0
            steps = list(range(10, 201, 10))
            losses = [6 + offset - math.log10(1000 * s * speed_up) + generator.gauss(0, noise) for s in steps]
            curve = {"step": steps, "tokens": [1000 * s for s in steps], "flops": [6e9 * s * cost for s in steps]}
            curve |= {"seconds": [2.0 * s * cost for s in steps], "test_loss": losses}
            own = {"label": label, "method": method, "weight": float(weight) if weight else None, "seed": seed}
            own |= {"curve": curve | {"validation_loss": losses}, "final_test_loss": losses[-1]}
            own |= {"peak_memory_bytes": {"resident": int(100 * MIB * (1 if method == "standard" else 1.5))}}
            append(path, rows.CONVERGE, losses[-1:], **_CONVERGE | own | details)


def append(path, kind, values, seed=0, command="let-bench", config="[training]\nsteps = 12\n", **details):
    own = {"command": command, "config": config, "seed": seed, "unit": "", "values": values, "origin": _origin()}
    rows.append(path, rows.row(kind, **own, **details))


_origin = functools.cache(rows.provenance)
_THROUGHPUT = {
    "baseline": "plain",
    "suite": "s",
    "num_student_params": NUM_STUDENT_PARAMS,
    "run_steps": 100,
    "stop_step": 50,
    "num_processes": 1,
    "device_name": "a CPU",
    "peak_is_of_measured_steps": True,
}
_CONVERGE = {
    "suite": "c",
    "role": "result",
    "preparation": {"what": "nothing", "tokens": 0, "flops": 0.0, "seconds": 0.0},
    "device_name": "a CPU",
}
