"""Each method is a configuration that the trainer's own checks accept."""

import copy
import dataclasses

import pytest

from let_plugin.bench.converge.methods import METHODS, Resources, configure
from let_plugin.config import TeacherConfig, plan
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER, TEXT, TOKENIZER
from let_plugin.preflight import checks as preflight

RESOURCES = Resources(
    large_teacher=TeacherConfig(path=TEACHER, tokenizer_path=TOKENIZER),
    selected_text=TEXT["validation"],
    shallow_blocks=2,
    shallow_steps=3,
)


@pytest.fixture
def config(config):
    config.let.teacher = TeacherConfig(spec="demo_teacher", center=True, final_norm=False)
    config.let.temperature = 2.0
    config.training.steps = 200
    return config


@pytest.mark.parametrize("name", [name for name in METHODS if name != "miniplm"])
def test_each_passes_the_checks(config, name):
    configure(config, name, None, RESOURCES)
    report = preflight.run(config)
    is_plain = name in ("standard", "gstack")
    assert ("LET        off" in report) == is_plain and config.let.enable != is_plain
    assert config.let.weight == {"rkd": 1.0, "salt": 1.0, "kd_large": 1.0}.get(name, 0.1 if is_plain else 0.5)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS.get(name).weight != "none"])
def test_another_weight_is_all_that_it_changes(config, name):
    other = copy.deepcopy(config)
    configure(config, name, None, RESOURCES)
    configure(other, name, 0.3, RESOURCES)
    assert other.let.weight == 0.3
    assert dataclasses.replace(other.let, weight=config.let.weight) == config.let


def test_what_the_baselines_are(config):
    def let_of(name):
        changed = copy.deepcopy(config)
        configure(changed, name, None, RESOURCES)
        return changed.let, plan.stop_step(changed, 1), plan.schedule(changed.let)

    rkd, stop, schedule = let_of("rkd")
    assert (rkd.target, rkd.temperature, stop) == ("logits", 2.0, 200)
    assert [schedule(step, stop_step=stop) for step in (0, 100, 199)] == [1, 1, 1]
    assert rkd.teacher.spec == "demo_teacher" and rkd.teacher.final_norm and not rkd.teacher.center
    salt, stop, schedule = let_of("salt")
    assert salt.target == "logits" and stop == 34  # 17 % of 200
    assert [schedule(step, stop_step=stop) for step in (0, 33, 34)] == [1, 1, 0]
    assert let_of("kd_large")[0].teacher.path == TEACHER
    # Controls keep all else.
    own = config.let
    assert let_of("labels")[0] == dataclasses.replace(own, target="labels")
    assert let_of("random_teacher")[0] == dataclasses.replace(own, control="random_teacher")
    assert let_of("shuffled_targets")[0] == dataclasses.replace(own, control="shuffled_targets")


def test_the_baselines_run_the_teacher_even_where_its_states_are_stored(config):
    config.let.teacher.features = "somewhere"
    configure(config, "salt", None, RESOURCES)
    assert config.let.teacher.features == ""


def test_selected_text_is_read_in_the_place_of_the_corpus(config):
    configure(config, "miniplm", None, RESOURCES)
    assert (config.dataloader.dataset, config.dataloader.dataset_path) == ("text_files", TEXT["validation"])
    preflight.run(config)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("kd_large", ["--large-teacher"]),
        ("miniplm", ["--selected-text"]),
        ("gstack", ["--gstack-blocks", "--gstack-steps"]),
    ],
)
def test_what_is_missing_is_said(config, name, keys):
    with pytest.raises(ConfigError) as error:
        configure(config, name, None, Resources())
    assert [problem.key for problem in error.value.problems] == keys


def test_let_must_be_let(config):
    config.let.target = "logits"
    for name in ("let", "random_teacher"):
        with pytest.raises(ConfigError, match="must be LET itself"):
            configure(copy.deepcopy(config), name, None, RESOURCES)
    with pytest.raises(ConfigError, match="did you mean 'rkd'"):
        configure(config, "rdk", None, RESOURCES)
