"""From a command line to the runs of a suite, in which order, which of them are left, and what is chosen."""

import json
from collections import Counter

import pytest
import tomli

from let_plugin.baselines.methods import Resources
from let_plugin.bench import cli, converge, rows
from let_plugin.bench.converge import Options, Planner, parse
from let_plugin.config import TeacherConfig
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.errors import ConfigError
from let_plugin.toml_config import load
from tests.unit.test_report import STUDENT_BLOCKS, STUDENT_EMBEDDING

NUM_STUDENT = STUDENT_BLOCKS + STUDENT_EMBEDDING  # the head is as large as the embedding
NUM_TEACHER = 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128  # the demo's

TOML = """\
base = "tests.support.tiny"
dump_folder = "{folder}/out"

[runtime]
device = "cpu"

[let]
weight = 0.5
stop_step = 2
teacher.spec = "demo_teacher"

[validator]
freq = 2
steps = 1
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    from let_plugin import data

    monkeypatch.setenv("WORLD_SIZE", "1")
    data.register()
    path = tmp_path / "run.toml"
    path.write_text(TOML.format(folder=tmp_path))
    return path


@pytest.fixture
def options(tmp_path):
    def make(**changes):
        values = {
            "methods": ["let", "rkd", "random_teacher"],
            "seeds": [0, 1],
            "tuning_seeds": [2],
            "weights": [],
            "test_dataset": "let_demo_test",
            "test_path": "",
            "resources": Resources(),
            "num_processes": 1,
            "out": tmp_path / "rows.jsonl",
            "work": tmp_path / "work",
        }
        return Options(**values | changes)

    return make


@pytest.fixture
def planned(config_file, options):
    return lambda overrides=(), **changes: Planner(load(config_file, list(overrides)), options(**changes))


def test_names():
    assert [parse(name) for name in ("let", "let@0.1", "standard")] == [
        ("let", None),
        ("let", 0.1),
        ("standard", None),
    ]
    for name in ("lett", "let@", "let@x", "let@-1", "let@nan", "standard@1", "gstack@2"):
        with pytest.raises(ConfigError, match="--methods"):
            parse(name)


def test_weights_without_a_grid_and_with_one(planned):
    untuned = planned(methods=["let", "rkd", "labels", "let@0.1"])
    assert untuned.tuned() == [] and untuned.tuning_runs() == []
    assert untuned.cells({}) == [
        *[("standard", None), ("let", 0.5), ("rkd", 1.0), ("labels", 0.5), ("let", 0.1)],
    ]
    tuned = planned(methods=["let", "rkd", "labels", "let@0.1"], weights=[0.1, 1.0], tuning_seeds=[7, 8])
    assert tuned.tuned() == ["let", "rkd"]
    assert [(run.seed, run.label) for run in tuned.tuning_runs()] == [
        (seed, name) for seed in (7, 8) for name in ("let@0.1", "let@1", "rkd@0.1", "rkd@1")
    ]
    # LET's weight is its controls', and what comes out twice is run once.
    assert tuned.cells({"let": 0.1, "rkd": 1.0}) == [
        *[("standard", None), ("let", 0.1), ("rkd", 1.0), ("labels", 0.1)],
    ]
    assert planned(methods=["labels"], weights=[1.0]).tuned() == ["let"]
    assert planned(methods=["let@1.0", "labels@1.0"], weights=[1.0]).tuned() == []


def test_a_run_is_the_users_configuration_but_for_the_method(planned):
    planner = planned(["--training.steps", "8", "--metrics.enable_tensorboard"])
    plain, let = (tomli.loads(planner.plan(*cell, 5).config) for cell in (("standard", None), ("let", 0.1)))
    assert plain["debug"]["seed"] == let["debug"]["seed"] == 5
    assert plain["let"]["enable"] is False and let["let"]["enable"] is True and let["let"]["weight"] == 0.1
    for key in ("training", "dataloader", "validator", "optimizer", "lr_scheduler", "metrics", "checkpoint"):
        assert plain[key] == let[key]  # the data among them
    assert not plain["metrics"]["enable_tensorboard"] and not plain["checkpoint"]["enable"]
    validator = plain["validator"]
    assert validator["dataloader"]["dataset"] == "let_demo_validation"
    assert validator["test"]["dataset"] == "let_demo_test"


def test_costs(planned):
    resources = Resources(
        large_teacher=TeacherConfig(path=TEACHER, tokenizer_path=TOKENIZER), shallow_blocks=2, shallow_steps=2
    )
    planner = planned(methods=["let", "rkd", "gstack", "kd_large"], resources=resources)
    runs = {cell[0]: planner.plan(*cell, 0) for cell in planner.cells({})}
    tokens = 4 * 64
    assert {run.step_flops for run in runs.values()} == {6 * NUM_STUDENT * tokens}
    assert runs["standard"].active_flops == runs["gstack"].active_flops == 0
    assert runs["let"].active_flops == pytest.approx(2 * NUM_TEACHER * tokens)
    # The teacher's head, forward; the student's own once more, forward and backward.
    heads = 2 * 4096 * 128 + 6 * 4096 * 48
    assert runs["rkd"].active_flops == pytest.approx((2 * NUM_TEACHER + heads) * tokens)
    assert runs["kd_large"].active_flops == pytest.approx(runs["rkd"].active_flops)
    preparation = runs["gstack"].preparation
    num_shallow = NUM_STUDENT - STUDENT_BLOCKS // 4 * 2
    assert preparation.flops == pytest.approx(6 * num_shallow * tokens * 2, rel=1e-3)  # the final norm is in neither
    assert (preparation.tokens, preparation.seconds) == (2 * tokens, None)
    shallow = tomli.loads(runs["gstack"].shallow.config)
    assert shallow["training"]["steps"] == 2 and shallow["checkpoint"]["enable"]


@pytest.mark.parametrize(
    ("changes", "overrides", "keys"),
    [
        ({"test_dataset": ""}, [], ["--test-dataset"]),
        ({"test_dataset": "let_demo_validation"}, [], ["--test-dataset"]),
        ({"test_dataset": "let_demo_tset"}, [], ["validator.test.dataset"]),
        ({}, ["--validator.freq", "3"], ["validator.freq"]),
        ({}, ["--training.max_norm", "-1"], ["training.max_norm"]),
        ({}, ["--let.target", "logits"], ["let"]),
        (
            {"methods": ["kd_large", "miniplm", "gstack"], "resources": Resources(shallow_blocks=3, shallow_steps=1)},
            [],
            ["--large-teacher", "--selected-text", "--gstack-blocks"],
        ),
    ],
)
def test_mistakes_of_the_configuration(planned, options, changes, overrides, keys):
    with pytest.raises(ConfigError) as error:
        planned(overrides, **changes)
    assert [problem.key for problem in error.value.problems] == keys
    assert not options().work.exists()


def test_mistakes_of_the_options(options, tmp_path):
    bad = options(
        methods=["lett", "rkd", "rkd"],
        seeds=[0, 0],
        tuning_seeds=[-1],
        weights=[0.0],
        num_processes=0,
        out=tmp_path,
    )
    with pytest.raises(ConfigError) as error:
        bad.check()
    assert [problem.key for problem in error.value.problems] == [
        *["--methods", "--methods", "--seeds", "--tuning-seeds", "--weights", "--processes", "--out"],
    ]


# Final validation loss of a run without a process: LET is best at 1, rkd at 0.1; standard is 4.
LOSSES = {"standard": 4.0, "let@0.1": 3.9, "let@1": 3.7, "rkd@0.1": 3.95, "rkd@1": 4.2, "random_teacher@1": 4.1}


@pytest.fixture
def suite(config_file, options, monkeypatch):
    """`let-bench converge` with runs that take no time; returns (labels with seeds in their order, the table)."""
    order = []

    def execute(run, folder, num_processes):
        order.append((run.label, run.seed))
        if len(order) == suite.dies_at:
            raise KeyboardInterrupt
        loss = LOSSES[run.label] + 0.001 * run.seed
        losses = [loss + 1, loss + 0.5, loss]
        return {
            "curve": {
                "step": [1, 2, 4],
                "active_steps": [0, 0, 0],
                "seconds": [0.1, 0.2, 0.4],
                "validation_loss": losses,
                "test_loss": [0.01 + value for value in losses],
            },
            "wall_seconds": 1.0,
            "device_name": "a CPU",
            "num_threads": 1,
            "peak_memory_bytes": {"resident": 2**20},
            "peak_is_of_training": True,
            "preparation": {"what": "nothing", "flops": 0.0, "tokens": 0, "seconds": 0.0},
        }

    monkeypatch.setattr(converge, "execute", execute)

    def suite(**changes):
        order.clear()
        text = converge.run(config_file, [], options(**changes), "let-bench converge x")
        return list(order), text

    suite.dies_at, suite.order = None, order
    return suite


def test_the_grid_first_then_each_method_with_one_seed_after_the_other(suite, options, capsys):
    order, text = suite(weights=[0.1, 1.0])
    assert order[:4] == [("let@0.1", 2), ("let@1", 2), ("rkd@0.1", 2), ("rkd@1", 2)]
    methods = ["standard", "let@1", "rkd@0.1", "random_teacher@1"]
    assert order[4:] == [(name, seed) for seed in (0, 1) for name in methods]
    out = capsys.readouterr().out
    assert "[4/12] tuning, rkd@1, seed 2: validation 4.2020, test 4.2120" in out and "[12/12] result, " in out
    assert "let: weight 1, by the validation loss (seed 2) of 0.1: 3.9020, 1: 3.7020" in text
    assert "let@1 is better than standard, significantly: -0.3000" in text
    found = rows.read(options().out)
    assert Counter(row["kind"] for row in found) == {"converge": 12, "converge_choice": 2}
    assert Counter(row.get("role") for row in found) == {"tuning": 4, "result": 8, None: 2}
    assert suite(weights=[0.1, 1.0]) == ([], text)  # all there
    assert rows.read(options().out) == found


def test_a_killed_suite_goes_on_with_what_is_missing(suite, options):
    whole, text = suite(weights=[0.1, 1.0])
    options().out.unlink()
    suite.dies_at = 7
    with pytest.raises(KeyboardInterrupt):
        suite(weights=[0.1, 1.0])
    suite.dies_at = None
    assert suite(weights=[0.1, 1.0]) == (whole[6:], text)


def test_more_is_added_to_what_is_there(suite, options):
    suite(methods=["let@1"])
    order, _ = suite(methods=["let@1", "rkd@1"], seeds=[0, 1, 2])
    assert order == [("rkd@1", 0), ("rkd@1", 1), ("standard", 2), ("let@1", 2), ("rkd@1", 2)]
    # A tuning seed that is also one of the results': the same run.
    order, _ = suite(methods=["let"], weights=[1.0, 0.1], tuning_seeds=[0])
    assert order == [("let@0.1", 0)]
    assert len({row["suite"] for row in rows.read(options().out)}) == 1


def test_the_command_refuses_with_one_message(config_file, tmp_path, capfd):
    args = ["converge", str(config_file), "--methods", "lett", "--work-dir", str(tmp_path / "work")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*args, "--out", str(tmp_path / "rows.jsonl"), "--seeds", "0", "0"])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("let-bench: 2 problems in the configuration\n  --methods = 'lett': unknown")
    assert not (tmp_path / "work").exists() and not (tmp_path / "rows.jsonl").exists()


def test_the_rows_are_json(suite, options):
    suite(methods=["let@1"], seeds=[0])
    for line in options().out.read_text().splitlines():
        assert json.loads(line)["suite"]
