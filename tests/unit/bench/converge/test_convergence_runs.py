"""What a row says of a run."""

import dataclasses

import pytest

from let_plugin.bench import rows
from let_plugin.bench.converge.runs import Preparation, Run, label, row

RUN = Run(
    method="let",
    weight=0.5,
    variant="",
    seed=3,
    config='base = "x"\n',
    preparation=Preparation(what="stored states", flops=70.0, tokens=9, seconds=None),
    shallow=None,
    tokens_per_step=8,
    step_flops=100.0,
    active_flops=5.0,
    details={"num_student_params": 2},
)
RESULT = {
    "curve": {
        "step": [1, 4],
        "active_steps": [1, 2],
        "seconds": [0.5, 1.5],
        "validation_loss": [5.0, 4.0],
        "test_loss": [5.5, 4.5],
    },
    "wall_seconds": 2.0,
    "device_name": "d",
    "peak_memory_bytes": {"resident": 1},
    "preparation": {"what": "stored states", "flops": 70.0, "tokens": 9, "seconds": 10.0},
}


def test_a_row_counts_the_preparation_and_the_active_steps(tmp_path):
    origin = rows.provenance()
    made = row(RUN, RESULT, origin, "let-bench converge x", {"suite": "s", "run": RUN.id(origin, 1)})
    assert made["curve"] == {
        "step": [1, 4],
        "tokens": [8, 32],
        "flops": [175.0, 480.0],  # 70 + 100 + 5; 70 + 4 * 100 + 2 * 5
        "seconds": [10.5, 11.5],
        "validation_loss": [5.0, 4.0],
        "test_loss": [5.5, 4.5],
    }
    assert (made["final_validation_loss"], made["final_test_loss"], made["values"]) == (4.0, 4.5, [4.5])
    assert (made["label"], made["seed"], made["active_steps"], made["unit"]) == ("let@0.5", 3, 2, "nats/token")
    rows.append(tmp_path / "rows.jsonl", made)
    assert rows.read(tmp_path / "rows.jsonl") == [made]
    assert RESULT["curve"]["active_steps"] == [1, 2]  # as it was


def test_what_makes_another_run():
    origin = rows.provenance()
    known = RUN.id(origin | {"time": "later"}, 1)
    assert RUN.id(origin, 1) == known
    others = [
        dataclasses.replace(RUN, seed=4).id(origin, 1),
        dataclasses.replace(RUN, config='base = "y"\n').id(origin, 1),
        dataclasses.replace(RUN, preparation=Preparation()).id(origin, 1),
        RUN.id(origin, 2),
        RUN.id(origin | {"code": "0000000"}, 1),
    ]
    assert len({known, *others}) == 1 + len(others)


@pytest.mark.parametrize(("weight", "expected"), [(None, "let"), (0.1, "let@0.1"), (3.0, "let@3")])
def test_labels_are_as_one_asks(weight, expected):
    assert label("let", weight, "") == expected
    assert label("let", weight, "x, y") == f"{expected} [x, y]"
