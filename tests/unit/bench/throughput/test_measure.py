"""A run under the watch, in this process; the profile of one."""

import json

import pytest
import torch

from let_plugin.bench.throughput.measure import Request, StepClock, Watch


@pytest.fixture
def watched(request, tmp_path):
    """Trains the tiny student's four steps under a request; LET stops after two. Returns what was measured."""

    def run(**fields):
        trainer = request.getfixturevalue("trainer")  # of the configuration as it is by now
        out = tmp_path / "result.json"
        Watch(trainer, Request(**{"config": "", "warmup": 2, "total": 4, "out": str(out)} | fields)).start()
        trainer.train()
        return json.loads(out.read_text())

    return run


def test_the_steps_after_the_warm_up_are_measured(watched):
    result = watched(is_active=False)
    assert len(result["step_seconds"]) == 2 and all(seconds > 0 for seconds in result["step_seconds"])
    assert sum(result["step_seconds"]) == pytest.approx(result["wall_seconds"], rel=0.05)
    assert result["tokens_per_step"] == 4 * 64
    assert result["peak_memory_bytes"].keys() == {"resident"} and result["peak_memory_bytes"]["resident"] > 2**20
    assert "parts" not in result


def test_free_memory_is_given_back_before_the_last_step_of_the_warm_up(request, watched, config, monkeypatch):
    from torchtitan.tools import utils

    config.let.enable = False
    trainer = request.getfixturevalue("trainer")
    give_back, steps = utils.device_module.empty_cache, []

    def note():
        steps.append(trainer.step)
        give_back()

    monkeypatch.setattr(utils.device_module, "empty_cache", note)
    watched(is_active=False)
    assert steps == [2]


@pytest.mark.slow
@pytest.mark.parametrize(("warmup", "is_active"), [(2, True), (0, False)])
def test_a_step_in_the_wrong_state_is_an_error(watched, warmup, is_active):
    with pytest.raises(RuntimeError, match="was to be measured with LET"):
        watched(warmup=warmup, is_active=is_active)


def test_a_profile_of_the_steps_with_the_teacher(watched, config):
    config.let.stop_step = 4
    result = watched(profile=True, is_active=True)
    parts = result["parts"]
    assert list(parts) == [
        "teacher: matrix products",
        "teacher: attention",
        "teacher: attention mask",
        "teacher: all else",
        "communication",
        "masking the target",
        "dimension match",
        "loss and its gradient",
        "gradient injection",
    ]
    for name in (
        "teacher: matrix products",
        "teacher: attention",
        "loss and its gradient",
        "gradient injection",
        "dimension match",
    ):
        assert parts[name] > 0, name
    assert max(parts, key=parts.get).startswith("teacher: ")
    assert sum(parts.values()) < max(result["step_seconds"])


def test_a_clock_measures_from_start_to_stop():
    clock = StepClock(torch.device("cpu"))
    assert clock.seconds() == []
    for _ in range(2):
        clock.start()
        clock.stop()
    first, second = clock.seconds()
    assert first >= 0 and second >= 0
