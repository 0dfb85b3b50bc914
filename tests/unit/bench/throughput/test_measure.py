"""A run under the watch, in this process; the profile of one."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torchtitan.tools import utils

from let_plugin.bench.throughput.measure import Watch


@pytest.fixture
def watched(request, tmp_path):
    """Trains the tiny student's four steps under a request; LET stops after two. Returns what was measured."""

    def run(**fields):
        trainer = request.getfixturevalue("trainer")  # of the configuration as it is by now
        out = tmp_path / "result.json"
        Watch(trainer, str(out), **{"warmup": 2, "total": 4} | fields).start()
        trainer.train()
        return json.loads(out.read_text())

    return run


def test_the_steps_after_the_warm_up_are_measured(watched, request, monkeypatch):
    trainer = request.getfixturevalue("trainer")
    give_back, steps = utils.device_module.empty_cache, []
    monkeypatch.setattr(utils.device_module, "empty_cache", lambda: (steps.append(trainer.step), give_back()))
    result = watched(is_active=False)
    assert steps.count(2) >= 1 and 4 not in steps  # free memory is given back before the last step of the warm-up
    assert len(result["step_seconds"]) == 2 and all(seconds > 0 for seconds in result["step_seconds"])
    assert sum(result["step_seconds"]) == pytest.approx(result["wall_seconds"], rel=0.05)
    assert result["tokens_per_step"] == 4 * 64
    assert result["peak_memory_bytes"].keys() == {"resident"} and result["peak_memory_bytes"]["resident"] > 2**20
    assert "parts" not in result


def test_a_run_that_takes_turns_makes_a_step_in_each(watched):
    """Four steps; between them, it gives its turn back."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:

        def give_turns():
            connection, num_turns = server.accept()[0], 0
            with connection:
                connection.sendall(b".")
                while connection.recv(1):
                    num_turns += 1
                    connection.sendall(b".")
            return num_turns

        turns = pool.submit(give_turns)
        result = watched(is_active=False, turns=f"127.0.0.1:{server.getsockname()[1]}")
        assert turns.result() == 3 and result["wall_seconds"] == sum(result["step_seconds"])


def test_the_parts_of_a_profiled_step(config, watched):
    config.let.stop_step = 4
    result = watched(is_active=True, profile=True)
    parts = result["parts"]
    assert {name for name, seconds in parts.items() if seconds > 0} == {  # the attention mask is the student's
        *(f"teacher: {part}" for part in ("matrix products", "attention", "all else")),
        *("masking the target", "communication", "dimension match, loss, its gradient", "gradient injection"),
    }
    assert sum(parts.values()) < max(result["step_seconds"])


@pytest.mark.slow
@pytest.mark.parametrize(("warmup", "is_active"), [(2, True), (0, False)])
def test_a_step_in_the_wrong_state_is_an_error(watched, warmup, is_active):
    with pytest.raises(RuntimeError, match="was to be measured with LET"):
        watched(warmup=warmup, is_active=is_active)
