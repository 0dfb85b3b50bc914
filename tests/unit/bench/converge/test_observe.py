"""A run under observation, in this process."""

import json

import pandas as pd
import pytest
from torchtitan.tools import utils

from let_plugin.bench.converge import observe
from tests.support import jobs


@pytest.fixture
def config(config):
    """Four steps, of which two with the teacher, evaluated at 1, 2 and 4."""
    config.validator.enable, config.validator.freq, config.validator.steps = True, 2, 1
    observe.add_test_split(config, "let_demo_test", "")
    return config


def test_what_is_seen(trainer, tmp_path, monkeypatch):
    """The peak of training is kept, which torchtitan starts anew at each logged step, and that of an evaluation is not:
    a stand-in counts what would be allocated.
    """
    state = {"peak": 0}
    monkeypatch.setattr(observe.measure, "local_peak_memory", lambda device: {"allocated": state["peak"]})
    monkeypatch.setattr(utils.device_module, "reset_peak_memory_stats", lambda *_: state.update(peak=0), raising=False)
    train_step, validate = trainer.train_step, trainer.validator.validate

    def step(iterator):
        state["peak"] = max(state["peak"], {1: 10, 2: 70, 3: 30, 4: 20}[trainer.step])
        train_step(iterator)

    def evaluate(model_parts, number):
        state["peak"] = 1000
        validate(model_parts, number)

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(trainer.validator, "validate", evaluate)
    out = tmp_path / "result.json"
    observe.Observer(trainer, str(out)).start()
    trainer.train()
    result = json.loads(out.read_text())
    assert result["peak_memory_bytes"] == {"allocated": 70}
    curve = pd.DataFrame(result["curve"]).to_dict("list")
    seconds = curve["seconds"]
    assert curve["step"] == [1, 2, 4] and curve["active_steps"] == [1, 2, 2]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < result["wall_seconds"]  # which has the evaluations in it
    logged = [line for line in jobs.metrics(tmp_path / "out") if "validation_metrics/loss" in line]
    assert curve["validation_loss"] == [line["validation_metrics/loss"] for line in logged]
    assert curve["test_loss"] == [line["test_metrics/loss"] for line in logged]
