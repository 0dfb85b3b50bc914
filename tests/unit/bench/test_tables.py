"""Tables say what the rows say, and nothing else."""

from let_plugin.bench import cli, frame, rows, tables
from tests.support import synthetic_rows


def cells(table, label):
    (line,) = [line for line in table.splitlines() if line.startswith(f"{label} ")]
    return line.removeprefix(label).split()


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_costs(path):
    synthetic_rows.throughput(path, pairs=3)
    synthetic_rows.profile(path)
    text = tables.text([path])
    assert cells(text, "plain") == ["197", "1,300.0", "1", "100.0", "1"]
    assert cells(text, "active 20%") == [
        *["182", "1,404.0", "1.0800", "[1.0800,", "1.0800]", "1.0667"],
        *["110.0", "1.1000", "[1.1000,", "1.1000]", "+10.0", "+8.0", "1.042x"],
    ]
    assert cells(text, "stopped 10%")[-1] == "+0.0"  # nothing to break even with
    assert "3 pairs on a CPU" in text and "slope 0.400 [0.400, 0.400]" in text
    assert "active 5%, profiled (1,000.0 ms/step; FLOP bound of LET 2.00% of plain):" in text
    assert cells(text, "teacher forward") == ["100.00", "10.00%"]
    assert cells(text, "the student's own step") == ["895.00", "89.50%"]
    assert "memory is that of whole runs" not in text and "is wide" not in text


def test_what_limits_a_measurement_is_said(path):
    synthetic_rows.throughput(path, pairs=1, shares=(6.0,), peak_is_of_measured_steps=False, interleaved=True)
    text = tables.text([path])
    assert "memory is that of whole runs" in text and ", 1 process, steps in turn; " in text
    assert cells(text, "active 600%")[-1] == "never" and "is wide" not in text
    synthetic_rows.throughput(path, suite="noisy", pairs=2, shares=(0.1,), noise=0.2)
    assert "The interval of active 10%, stopped 10% is wide: " in tables.text([path], "noisy")


def test_gains(path):
    methods = {"standard": 1.0, "let@0.1": 1.0, "let@1": 2.0, "rkd@1": 1.0, "labels@1": 1.5, "gstack": 0.5}
    before = {"what": "shallow model", "tokens": 2000, "flops": 500.0, "seconds": None}
    synthetic_rows.converge(path, methods=methods)
    own = [row | {"preparation": before} if row["label"] == "gstack" else row for row in frame.read([path])]
    choice = {"method": "rkd", "weights": [0.1, 1.0], "values": [4.5, 4.4], "chosen": 1.0, "tuning_seeds": [5]}
    scale = choice | {"method": "wide", "weights": ["a.scale 1e-1", "a.scale 0.2"], "chosen": "a.scale 1e-1"}
    inside = choice | {"method": "let", "weights": [0.1, 1.0, 9.0], "values": [4.5, 4.4, 4.6]}
    own += [{"kind": rows.CHOICE, "suite": "c", **more} for more in (choice, scale, inside)]
    own += [{"kind": rows.DIVERGED, "suite": "c", "label": "salt@9", "role": "result", "seed": 3}]
    text = tables.suite_text(frame.suites(own)[0])
    # log10(2) lower, with a tenth more FLOPs and time, and half more memory.
    assert "-0.3010 [-0.3010, -0.3010]  2.000x [2.000, 2.000]  1.818x" in lines_of(text, "let@1 ")[0]
    assert lines_of(text, "let@1 ")[0].endswith(" 150")
    assert "not reached by 5 of 5" in lines_of(text, "gstack ")[0]
    verdicts = "better: let@1, labels@1; worse: gstack; no difference resolved: let@0.1, rkd@1."
    assert lines_of(text, f"Against standard: {verdicts}")
    assert lines_of(text, "Against labels@1: better: let@1 (-0.1249 [-0.1249, -0.1249]).")
    assert lines_of(text, "9 comparisons, each at 95 %")  # a control says nothing about another weight
    assert lines_of(text, "Seeds 0, 1, 2, 3, 4 on a CPU")
    assert lines_of(text, "rkd: weight 1, by the validation loss (seed 5) of 0.1: 4.5000, 1: 4.4000; at the end of the")
    assert lines_of(text, "gstack: shallow model, 2,000 tokens, 500 FLOPs, an unknown time.")
    assert lines_of(text, "salt@9 has no result: it diverged with seed 3 (held-out loss is NaN).")
    assert [line.endswith("it") for line in (*lines_of(text, "wide: a"), *lines_of(text, "let: w"))] == [True, False]


def test_a_round_that_is_not_complete_does_not_count(path):
    synthetic_rows.throughput(path, pairs=3)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "2 pairs on a CPU" in tables.text([path])


def test_one_seed_says_nothing(path):
    synthetic_rows.converge(path, seeds=1)
    text = tables.text([path])
    assert "Seed 0 on" in text and "[" not in text and "Against" not in text
    assert lines_of(text, "One seed: no difference here can be told from chance")


def test_a_table_for_each_suite_or_for_one(path, capsys):
    synthetic_rows.throughput(path, suite="a")
    synthetic_rows.throughput(path, suite="b", pairs=2)
    cli.main(["table", str(path)])
    assert capsys.readouterr().out == "\n\n".join(f"rows\n\n{tables.text([path], own)}" for own in "ab") + "\n"
