"""The matrix of cases, and what each makes of a configuration."""

import pytest

from let_plugin.bench.throughput import cases
from let_plugin.bench.throughput.cases import Steps, matrix
from let_plugin.bench.throughput.random_teacher import RandomTeacher
from let_plugin.config.errors import ConfigError
from let_plugin.preflight import checks as preflight

STEPS = Steps(measured=4)
NO_TEACHERS = [(None, None)]
SMALL, LARGE = RandomTeacher(16, 1, 1, 48, 4096), RandomTeacher(32, 2, 2, 80, 4096)


def labels(names, **sizes):
    sizes = {"teachers": NO_TEACHERS, "local_batch_sizes": [4], "seq_lens": [64]} | sizes
    return [variant.label for variant in matrix(names, **sizes)]


def test_plain_is_there_once_and_first():
    assert labels(["active", "stopped"]) == ["plain", "active", "stopped"]
    assert labels(["stopped", "plain", "stopped"]) == ["plain", "stopped"]
    # Plain once more: what it differs by is the measurement's own doing. It has no teacher, so it is there once.
    sizes = {"teachers": [(0.02, SMALL), (0.1, LARGE)]}
    assert labels(["control", "stopped"], **sizes) == ["plain", "control", "stopped 2%", "stopped 10%"]


def test_sizes():
    teachers = [(0.02, SMALL), (0.1, LARGE)]
    assert labels(["active", "stopped"], teachers=teachers) == [
        "plain",
        "active 2%",
        "active 10%",
        "stopped 2%",
        "stopped 10%",
    ]
    assert labels(["active"], local_batch_sizes=[1, 2], seq_lens=[32]) == [
        "plain batch 1",
        "active batch 1",
        "plain batch 2",
        "active batch 2",
    ]
    names = labels(["active"], teachers=teachers, local_batch_sizes=[1, 2], seq_lens=[32, 64])
    assert len(names) == len(set(names)) == 2 * 2 * 3


def test_a_case_is_compared_with_the_plain_one_of_its_size():
    variants = matrix(["active"], teachers=NO_TEACHERS, local_batch_sizes=[1, 2], seq_lens=[32, 64])
    for variant in variants:
        plain = cases.baseline(variant, variants)
        assert plain.case == "plain"
        assert (plain.local_batch_size, plain.seq_len) == (variant.local_batch_size, variant.seq_len)


def test_unknown_case():
    with pytest.raises(ConfigError, match="did you mean 'stopped'"):
        labels(["stoped"])


def configured(config, case, teacher=None, **folders):
    (variant,) = [
        v
        for v in matrix([case], teachers=[(0.1 if teacher else None, teacher)], local_batch_sizes=[2], seq_lens=[32])
        if v.case == case
    ]
    return cases.configure(config, variant, STEPS, dump_folder="bench", **{"weights": ""} | folders)


def test_configurations(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config.let.warmup_steps, config.let.stop_step, config.let.stop_fraction = 1, None, 0.25
    config.let.adaptive_stop.criterion, config.metrics.enable_tensorboard = "gradient", True
    config.checkpoint.enable = config.validator.enable = True
    plain, active, stopped, rkd = (configured(config, name) for name in ("plain", "active", "stopped", "rkd"))
    for each in (plain, active, stopped, rkd):
        preflight.run(each)
        assert each.training.steps == STEPS.total == 8
        assert (each.training.local_batch_size, each.training.seq_len, each.dump_folder) == (2, 32, "bench")
        assert not (each.checkpoint.enable or each.validator.enable or each.metrics.enable_tensorboard)
        assert each.metrics.log_freq > STEPS.total  # no measured step is logged
    assert [each.let.enable for each in (plain, active, stopped, rkd)] == [False, True, True, True]
    assert active.let.stop_step == rkd.let.stop_step == STEPS.total
    assert (active.let.target, rkd.let.target, rkd.let.schedule) == ("teacher", "logits", "constant")
    assert stopped.let.stop_step < STEPS.warmup
    # The user's own is left as it was.
    assert config.training.steps == 4 and config.let.stop_fraction == 0.25 and config.metrics.enable_tensorboard


def test_a_random_teacher_takes_the_place_of_the_configured_one(config, tmp_path):
    SMALL.register()
    config.let.teacher.center = True
    path = SMALL.write(tmp_path)
    active = configured(config, "active", SMALL, weights=str(path))
    assert f"teacher    torchtitan llama3 {SMALL.name}, DCP from {path}: 1 blocks of width 16" in preflight.run(active)


def test_states_take_the_place_of_the_teacher(config):
    features = configured(config, "features", states="states").let
    assert (features.teacher.features, features.teacher.path, features.teacher.spec) == ("states", "", "")
    assert features.target == "teacher" and features.stop_step == STEPS.total
