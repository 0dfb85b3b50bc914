"""The runs of a suite: their weights, configurations and costs, and what is wrong with them."""

import pytest
import tomli

from let_plugin.bench.converge.methods import Resources
from let_plugin.bench.converge.plan import Planner, parse
from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.config.load import load
from let_plugin.demo import TEACHER, TOKENIZER
from tests.unit.preflight.test_report import STUDENT_BLOCKS, STUDENT_EMBEDDING

NUM_STUDENT = STUDENT_BLOCKS + STUDENT_EMBEDDING  # the head is as large as the embedding
NUM_TEACHER = 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128  # the demo's


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
