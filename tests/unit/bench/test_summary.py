"""The table says what the rows say, and nothing else."""

import pytest

from let_plugin.bench import rows, summary

MIB = 2**20


def write(path, label, pair, seconds, memory, **details):
    fields = {
        "case": label,
        "label": label,
        "baseline": "plain",
        "suite": "s",
        "pair": pair,
        "flop_bound": 0.0,
        "memory_bound_bytes": 0,
        "run_steps": 100,
        "stop_step": 50,
        "num_processes": 1,
        "device_name": "a CPU",
        "tokens_per_second": 1000 / seconds,
        "peak_memory_bytes": {"resident": memory * MIB},
        "peak_is_of_measured_steps": True,
    }
    values = [seconds, 0.9 * seconds, 5 * seconds]  # a slow step does not move the median
    origin = rows.provenance()
    own = {"command": "x", "config": "", "seed": 0, "unit": "s/step", "values": values, "origin": origin}
    rows.append(path, rows.row(details.pop("kind", "throughput"), **own, **(fields | details)))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    bounds = {"flop_bound": 0.02, "memory_bound_bytes": 8 * MIB}
    for pair, drift in enumerate([1.0, 2.0, 4.0]):
        write(path, "plain", pair, drift, 100)
        write(path, "active", pair, 1.1 * drift, 110, **bounds)
        write(path, "stopped", pair, drift, 100)
    write(path, "plain", 3, 1000.0, 1000)  # a round that was broken off
    write(path, "plain", 0, 7.0, 7, suite="another")
    return path


def cells(table, label):
    (line,) = [line for line in table.splitlines() if line.startswith(f"{label} ")]
    return line.split()


def test_table(path):
    table = summary.table(path, "s")
    assert cells(table, "plain") == ["plain", "500", "2,000.0", "1", "100.0", "1"]
    assert cells(table, "active") == [
        *["active", "455", "2,200.0", "1.1000", "[1.1000,", "1.1000]", "1.0200"],
        *["110.0", "1.1000", "[1.1000,", "1.1000]", "+10.0", "+8.0"],
        "1.053x",  # 100 / (100 - 0.1 * 50)
    ]
    assert cells(table, "stopped")[3:7] == ["1.0000", "[1.0000,", "1.0000]", "1.0000"]
    assert cells(table, "stopped")[-1] == "+0.0"  # no break-even: it is not paid for
    assert "3 pairs on a CPU" in table and "profiled" not in table


def test_steps_that_were_made_in_turn_are_pairs(path):
    """A machine that was slow for two of three steps: for the first of them both runs, for the last one of them."""
    for pair in range(3):
        for label, factor in (("plain", 1.0), ("active", 1.1)):
            write(path, label, pair, factor, 100, suite="t", interleaved=True)
    found = summary.by_label([row | {"values": [1.0, 4.0, 4.0]} for row in rows.read(path)], "t")
    active = [row | {"values": [1.1, 4.4, 9.9]} for row in found["active"]]
    assert summary.step_time_ratio(active, found["plain"]).value == pytest.approx(1.1)
    assert ", 1 process, steps in turn; " in summary.table(path, "t")


def test_a_teacher_that_never_pays(path):
    for pair in range(3):
        write(path, "plain", pair, 1.0, 100, suite="t")
        write(path, "active", pair, 3.5, 100, suite="t", flop_bound=2.0)
    assert cells(summary.table(path, "t"), "active")[-1] == "never"


def test_a_profile_adds_up(path):
    parts = {"teacher forward": 0.1, "gradient injection": 0.005}
    write(path, "active", None, 1.0, 100, kind="profile", parts=parts, flop_bound=0.02)
    table = summary.table(path, "s")
    assert "active, profiled (1,000.0 ms/step; FLOP bound of LET 2.00% of plain):" in table
    assert cells(table, "teacher")[-2:] == ["100.00", "10.00%"]
    assert cells(table, "the")[-2:] == ["895.00", "89.50%"]


def test_memory_that_could_not_be_reset_is_said(path):
    for label in ("plain", "active"):
        write(path, label, 0, 1.0, 100, suite="u", peak_is_of_measured_steps=False)
    assert "memory is that of whole runs" in summary.table(path, "u")
    assert "memory is that of whole runs" not in summary.table(path, "s")
