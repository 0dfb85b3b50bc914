"""Methods and the runs that they make: each is a configuration that the trainer's own checks accept."""

import dataclasses
import json

import pytest

from let_plugin.bench import rows
from let_plugin.bench.converge import data_selection
from let_plugin.bench.converge.methods import METHODS, parse, read_file
from let_plugin.bench.converge.plan import Planner
from let_plugin.config import plan
from let_plugin.config.errors import ConfigError
from tests.support import exports
from tests.unit.preflight.test_report import STUDENT, STUDENT_BLOCKS, TEACHER_BLOCKS, TEACHER_EMBEDDING

TOKENS = 4 * 64


@pytest.fixture
def planned(parsed):
    def planned(text, *more):
        return Planner(*parsed("converge", f"--test-dataset let_demo_test --seeds 0 {text}", *more))

    return planned


def config_of(planner, method, point=(), seed=0):
    return planner.setup.load(planner.run(method, point, seed).argv[1:]).config


def test_names():
    assert parse("let", METHODS) is METHODS["let"]
    assert parse("let@0.1", METHODS).options == (*METHODS["let"].options, "--let.weight", "0.1")
    mine = parse("mine = rkd@2 --let.temperature 3 --let.teacher.path 'a b'", METHODS)
    own = ("--let.weight", "2", "--let.temperature", "3", "--let.teacher.path", "a b")
    assert (mine.name, mine.options, mine.asked) == ("mine", (*METHODS["rkd"].options, *own), "")
    for name in ("lett", "standard@1", "gstack@2", "mine=lett", "mine =", "mine = let 'a", "mine@1 = let@1"):
        with pytest.raises(ConfigError, match="--methods"):
            parse(name, METHODS)
    assert {method.name for method in METHODS.values() if method.like == "let"} == set(rows.CONTROLS)


def test_what_the_methods_are(planned):
    own = "--training.steps 200 --let.teacher.center --let.teacher.no-final-norm"
    planner = planned(f"--methods rkd salt labels random_teacher shuffled_targets {own}")  # each is checked
    standard, rkd, salt, *controls = (config_of(planner, method) for method in planner.methods)
    assert not standard.let.enable
    for config, stop in ((rkd, 200), (salt, 34)):  # 17 % of 200
        let, schedule = config.let, plan.schedule(plan.terms(config.let)[0])
        assert plan.last_step(config, 1) == stop and (let.signal, let.weight) == ("logits", 1.0)
        assert [schedule(step, stop_step=stop) for step in (0, stop // 2, stop - 1, stop)] == [1, 1, 1, 0]
        assert let.teacher.spec == "tiny_teacher" and let.teacher.final_norm and not let.teacher.center
    # Controls keep all else.
    let = planner.setup.load([]).config.let
    others = ({"signal": "labels"}, {"control": "random_teacher"}, {"control": "shuffled_targets"})
    assert [config.let for config in controls] == [dataclasses.replace(let, **other) for other in others]


def test_a_grid_over_any_option(planned, tmp_path):
    untuned = planned("--methods let rkd labels let@0.1")
    assert untuned.tuned() == []
    labels = [untuned.run(method, untuned.chosen(method, {}), 0).label for method in untuned.methods]
    assert labels == ["standard", "let@0.5", "rkd@1", "labels@0.5", "let@0.1"]

    tuned = planned("--methods let rkd labels let@0.1 --grid let.weight 0.1 1 --grid lr_scheduler.warmup_steps 1 2")
    names = [method.name for method in tuned.tuned()]
    assert names == ["standard", "let", "rkd", "let"]  # the last one is let@0.1: its other key only
    points = [tuned.points(method) for method in tuned.tuned()]
    assert [len(own) for own in points] == [2, 4, 4, 2]
    best = (("lr_scheduler.warmup_steps", "2"), ("let.weight", "1"))
    labels = tuned.methods[3]
    assert tuned.chosen(labels, {tuned.methods[1]: best}) == best
    assert tuned.run(labels, best, 5).label == "labels@1 [lr_scheduler.warmup_steps 2]"
    config = config_of(tuned, labels, best, 5)
    assert (config.let.weight, config.debug.seed) == (1.0, 5)

    asked = ("labels", "labels@2")  # whose weight it takes, if it has none of its own
    assert [planned(f"--methods {m} --grid let.weight 1").tuned() for m in asked] == [[METHODS["let"]], []]


def test_a_file_of_methods(planned, tmp_path):
    file = tmp_path / "methods.toml"
    file.write_text(
        'early = ["--let.stop-step", "1"]\n[basis]\noptions = ["--let.loss", "mse"]\nlike = "early"\n'
        '[wide]\nbase = "early"\noptions = ["--let.warmup-steps", "1"]\ngrid = {"let.weight" = [0.1, 2.0, 3]}\n'
        '[others]\ngrid = {"let.teacher.path" = ["v1.0"]}\n'
    )
    assert read_file(file)["others"].grid == {"let.teacher.path": ["v1.0"]}
    planner = planned(f"--methods early basis wide --grid let.weight 0.3 0.4 1 --methods-file {file}")
    early, basis, wide = planner.methods[1:]
    assert planner.tuned() == [early, wide] and wide.options == ("--let.stop-step", "1", "--let.warmup-steps", "1")
    assert [[v for ((_, v),) in planner.points(m)] for m in (early, wide)] == [["0.3", "0.4", "1"], ["0.1", "2", "3"]]
    basis = config_of(planner, basis, planner.chosen(basis, {early: planner.points(early)[1]}))
    assert (basis.let.loss, basis.let.weight) == ("mse", 0.4)
    with pytest.raises(ConfigError, match="every method gets the same budget"):
        planned(f"--methods wide let --grid let.weight 1 2 --methods-file {file}")
    file.write_text('a = 3\n[b]\noption = []\n[c]\nlike = "d"\nbase = "e"\n')
    with pytest.raises(ConfigError) as error:
        read_file(file)
    assert [problem.key for problem in error.value.problems] == ["a.options", "b.option", "c.base", "c.like"]


def test_costs(planned, tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text("{}")
    before = {"flops": 7.0, "tokens": 8, "seconds": 9.0}
    data_selection.costs_file(kept).write_text(json.dumps(before))
    selected = f"miniplm = standard --dataloader.dataset text_files --dataloader.dataset_path {kept}"
    planner = planned("--gstack-blocks 2 --gstack-steps 2 --methods let rkd gstack", selected)
    runs = {method.name: planner.run(method, (), 0).details for method in planner.methods}
    assert {details["step_flops"] for details in runs.values()} == {6 * STUDENT * TOKENS}
    active = {name: details["active_flops"] for name, details in runs.items()}
    assert active["standard"] == active["gstack"] == active["miniplm"] == 0
    assert active["let"] == pytest.approx(2 * TEACHER_BLOCKS * TOKENS)
    # With the teacher's head, as large as its embedding; the student's has made its logits already.
    assert active["rkd"] == pytest.approx(2 * (TEACHER_BLOCKS + TEACHER_EMBEDDING) * TOKENS)
    num_shallow = STUDENT - STUDENT_BLOCKS // 4 * 2
    shallow = runs["gstack"]["preparation"]
    assert shallow["flops"] == pytest.approx(6 * num_shallow * TOKENS * 2, rel=1e-3)  # the final norm is in neither
    assert (shallow["tokens"], shallow["seconds"]) == (2 * TOKENS, None)
    assert runs["miniplm"]["preparation"] == {"what": "selection of documents", **before}


def test_states_that_are_stored_were_made_before(config, planned, parallel_dims, tmp_path):
    """Of the two steps that are aligned, of 4 x 64 tokens."""
    exports.run(config, "--out", tmp_path / "features")
    features = ["--let.teacher.spec", "", "--let.teacher.features", str(tmp_path / "features")]
    planner = planned("--methods let --let.stop-step 2", *features)
    details = planner.run(planner.methods[1], (), 0).details
    made = {"what": "stored states", "flops": 2 * TEACHER_BLOCKS * 512, "tokens": 512, "seconds": None}
    assert (details["active_flops"], details["preparation"]) == (0, made)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("--test-dataset=", ["--test-dataset"]),
        ("--test-dataset let_demo_validation --validator.freq 3", ["--test-dataset", "validator.freq"]),
        ("--test-dataset let_demo_tset", ["validator.test.dataset"]),
        ("--let.signal logits", ["let"]),
        ("--methods gstack", ["--gstack-blocks", "--gstack-steps"]),
        ("--methods gstack --gstack-blocks 3 --gstack-steps 1", ["--gstack-blocks"]),
        ("--methods lett rkd rkd", ["--methods"]),
        ("--methods let@x let@-1", ["let.weight", "let.weight"]),
        ("--grid let.weight", ["--grid"]),
        ("--grid let.wieght 1 --methods let", ["let.wieght"]),
    ],
)
def test_mistakes(planned, tmp_path, text, keys):
    with pytest.raises(ConfigError) as error:
        planned(text)
    assert sorted(problem.key for problem in error.value.problems) == sorted(keys)
    for more, key in (("standard = rkd", "--methods"), ("short = let --training.steps 5", "validator.freq")):
        with pytest.raises(ConfigError, match=key):
            planned("--methods let", more)
    assert not (tmp_path / "work").exists()
