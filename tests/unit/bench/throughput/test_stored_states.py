"""States that a run of a suite is to read: made once, by the real export."""

import pytest

from let_plugin.bench.processes import RunFailedError
from let_plugin.bench.throughput import stored_states
from let_plugin.teacher.stored.features import Features


@pytest.mark.slow
def test_states_are_made_once(tmp_path, tiny_config, capsys):
    def make(text):
        return stored_states.make(text, None, label="features", data_parallel_degree=2, work=tmp_path / "states")

    text = tiny_config.read_text()
    folder = make(text)
    # All rows of the alignment's 4 steps, of both ranks.
    settings = Features(str(folder)).settings
    assert (settings["data_parallel_degree"], settings["rows_per_rank"]) == (2, 4 * 4)
    assert "stored the teacher's states for features" in capsys.readouterr().out
    assert make(text) == folder and capsys.readouterr().out == ""
    with pytest.raises(RunFailedError, match="'states for features' failed with exit code 2"):
        make(text.replace("stop_step = 4", "stop_step = 400"))
