"""Rows with a known effect, and what the table says of them."""

import math

import pytest

from let_plugin.bench.converge.table import loss_difference, of_rows, speed_up, table

MIB = 2**20
SEED_NOISE = [0.03, -0.02, 0.0, 0.05, -0.06]  # shared by the runs of a seed: pairs take it out


def run(method, seed, *, weight=None, shift=0.0, flops_before=0.0, flops_per_step=10.0, own_noise=0.0):
    """A curve that falls by 0.01 nats per step, to 4 at step 100 where nothing shifts it."""
    steps = [1, *range(10, 101, 10)]
    losses = [5 - 0.01 * step + shift + SEED_NOISE[seed] + own_noise for step in steps]
    return {
        "method": method,
        "weight": weight,
        "seed": seed,
        "final_test_loss": losses[-1],
        "final_validation_loss": losses[-1] - 1,
        "curve": {
            "step": steps,
            "tokens": [1000 * step for step in steps],
            "flops": [flops_before + flops_per_step * step for step in steps],
            "seconds": [float(step) for step in steps],
            "test_loss": losses,
        },
        "peak_memory_bytes": {"resident": 100 * MIB},
        "preparation": {"what": "nothing", "tokens": 0, "flops": 0.0, "seconds": 0.0},
        "device_name": "a CPU",
        "device": "x86",
    }


def runs(method, num=5, noise=(0.0,) * 5, **fields):
    return [run(method, seed, own_noise=noise[seed], **fields) for seed in range(num)]


def test_the_difference_is_that_of_pairs():
    difference = loss_difference(runs("let", shift=-0.2), runs("standard"))
    assert difference.value == pytest.approx(-0.2) and difference.high == pytest.approx(-0.2)
    noisy = loss_difference(runs("let", noise=(0.1, -0.1, 0.1, -0.1, 0.0)), runs("standard"))
    assert noisy.contains(0) and noisy.num_pairs == 5


def test_the_speed_up_in_steps_and_in_flops():
    """0.2 nats less from the start: 20 steps earlier; at 12 FLOPs per step, and 40 before the first one."""
    own = runs("let", shift=-0.2, flops_per_step=12.0, flops_before=40.0)
    in_steps, missed = speed_up(own, runs("standard"), "step")
    assert missed == 0 and in_steps.value == pytest.approx(100 / 80)
    in_flops, _ = speed_up(own, runs("standard"), "flops")
    assert in_flops.value == pytest.approx(1000 / (40 + 12 * 80))


def test_the_baseline_too_is_taken_where_it_is_first_there():
    baseline = runs("standard")
    for row in baseline:
        row["curve"]["test_loss"][-1] = row["final_test_loss"] = row["curve"]["test_loss"][-3]  # was there at 80
    estimate, _ = speed_up(runs("let"), baseline, "step")
    assert estimate.value == pytest.approx(1.0)


def test_a_run_that_never_gets_there_leaves_no_ratio():
    own = [*runs("let", shift=-0.2)[:4], run("let", 4, shift=0.5)]
    assert speed_up(own, runs("standard"), "step") == (None, 1)


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_what_is_said():
    results = {
        "standard": runs("standard"),
        "let@1": runs("let", weight=1.0, shift=-0.2, noise=(0.01, 0.0, -0.01, 0.0, 0.01)),
        "rkd@1": runs("rkd", weight=1.0, noise=(0.1, -0.1, 0.1, -0.1, 0.01)),
        "random_teacher@1": runs("random_teacher", weight=1.0, shift=0.1, noise=(0.01, 0.0, -0.01, 0.0, 0.0)),
        "labels@3": runs("labels", weight=3.0),
    }
    choice = {"method": "rkd", "weights": [0.1, 1.0], "values": [4.5, 4.4], "chosen": 1.0, "tuning_seeds": [5]}
    text = table(results, [choice])
    assert lines_of(text, "let@1 is better than standard, significantly: -0.1980 (95 %: -0.2")
    assert lines_of(text, "rkd@1 and standard: no difference is resolved, +0.0020 (95 %: -")
    assert lines_of(text, "random_teacher@1 is worse than standard, significantly: +0.1")
    assert lines_of(text, "let@1 is better than random_teacher@1, significantly: -0.298")
    assert not lines_of(text, "let@1 is better than labels@3")  # another weight
    assert lines_of(text, "5 comparisons, each at 95 %")
    assert lines_of(text, "5 seeds (0, 1, 2, 3, 4) of each method on a CPU")
    assert lines_of(text, "rkd: weight 1, by the validation loss (seed 5) of 0.1: 4.5000, 1: 4.4000; at the end of the")
    (row,) = lines_of(text, "let@1  ")
    mean = 5 - 1 - 0.2 + sum(SEED_NOISE) / 5 + 0.002
    assert row.split()[1] == f"{mean:.4f}" and "1.247x [" in row
    (row,) = lines_of(text, "random_teacher@1  ")
    assert "not reached by 5 of 5" in row


def test_one_seed_says_nothing():
    text = table({"standard": runs("standard", 1), "let@1": runs("let", 1, weight=1.0, shift=-0.2)}, [])
    assert "1 seed (0) of each method" in text and "No difference" not in text
    assert lines_of(text, "One seed: no difference here can be told from chance")
    assert not math.isnan(float(lines_of(text, "let@1  ")[0].split()[2]))


def test_the_preparation_is_said():
    own = runs("gstack", flops_before=500.0)
    for row in own:
        row["preparation"] = {"what": "shallow model", "tokens": 2000, "flops": 500.0, "seconds": None}
    text = table({"standard": runs("standard"), "gstack": own}, [])
    assert "gstack: shallow model, 2,000 tokens, 500 FLOPs, a time that is not known." in text


def test_rows_of_a_suite_in_any_state():
    """As they come: by seed, with runs that tuned; of a seed that is not complete nothing is shown."""
    found = [row | {"kind": "converge", "label": row["method"]} for name in ("standard", "rkd") for row in runs(name)]
    by_seed = sorted(found, key=lambda row: row["seed"])
    measured = [row | {"role": "result"} for row in by_seed]
    tuning = run("rkd", 0, weight=0.1) | {"kind": "converge", "label": "rkd@0.1", "role": "tuning"}
    expected = {name: [row for row in measured if row["label"] == name] for name in ("standard", "rkd")}
    assert of_rows([tuning, *measured]) == table(expected, [])
    choice = {"kind": "converge_choice", "method": "rkd", "weights": [0.1, 1.0], "values": [4.0, 3.9], "chosen": 1.0}
    assert of_rows([*measured, choice | {"tuning_seeds": [5]}]) == table(expected, [choice | {"tuning_seeds": [5]}])
    assert of_rows(measured[:-1]) == table({name: own[:-1] for name, own in expected.items()}, [])
    assert of_rows(measured[:1]) == of_rows([tuning]) == of_rows([]) == ""  # nothing to compare the baseline with
