"""LET's own state in a checkpoint, written by the distributed checkpointer as torchtitan writes it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.config.errors import ConfigError
from let_plugin.runtime import checkpoint

SETTINGS = {"threshold": 0.0, "smoothing": 0.9, "patience": 2}


def written(folder):
    """A checkpoint with an adaptive stop in it, and that stop."""
    stop = AdaptiveStop(**SETTINGS)
    for step in range(3):
        stop.update(-0.1 * step, next_step=step)
    dcp.save({"own": stop, "model": {"weight": torch.ones(2)}}, checkpoint_id=str(folder), no_dist=True)
    return stop


def read(config, name="own", step=2):
    stop = AdaptiveStop(**SETTINGS)
    checkpoint.restore(name, stop, config, step)
    return stop


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_is_read_from_the_runs_own_checkpoint(config, tmp_path):
    expected = written(tmp_path / "out" / config.checkpoint.folder / "step-2")
    got = read(config)
    assert same(got, expected) and got.stop_step == expected.stop_step == 2


def test_it_is_read_from_a_remote_file_system(config):
    config.dump_folder = "memory://run"
    expected = written(f"memory://run/{config.checkpoint.folder}/step-2")
    assert same(read(config), expected)


def test_or_from_the_one_that_the_run_has_started_from(config, tmp_path):
    config.checkpoint.initial_load_path = str(tmp_path / "elsewhere")
    expected = written(tmp_path / "elsewhere")
    assert same(read(config), expected)


def test_a_checkpoint_without_it_is_said_and_changes_nothing(config, tmp_path, caplog):
    caplog.set_level("INFO")
    written(tmp_path / "out" / config.checkpoint.folder / "step-2")
    assert same(read(config, name="other"), AdaptiveStop(**SETTINGS))


@pytest.mark.parametrize("what", ["identity", "shape"])
def test_the_state_of_something_else_is_refused(config, tmp_path, what):
    folder = tmp_path / "out" / config.checkpoint.folder / "step-2"
    stop = AdaptiveStop(**SETTINGS)
    dcp.save({"own": checkpoint.Identified(stop, [3, 11])}, checkpoint_id=str(folder), no_dist=True)
    again = checkpoint.Identified(AdaptiveStop(**SETTINGS), [3, 11])
    checkpoint.restore("own", again, config, 2)  # its own

    other = checkpoint.Identified(AdaptiveStop(**SETTINGS), [3, 10] if what == "identity" else [3, 11, 12])
    with pytest.raises(ConfigError, match=r"step-2 has a own of other settings .* start afresh"):
        checkpoint.restore("own", other, config, 2)
