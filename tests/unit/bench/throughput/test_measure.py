"""A run under the watch, in this process; the profile of one."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, record_function
from torchtitan.tools import utils

from let_plugin.bench.throughput.measure import Watch, range_seconds
from let_plugin.guidance.guidance import TARGET_RANGE
from let_plugin.teacher.base import MASK_RANGE
from let_plugin.teacher.sharding import TEACHER_RANGE


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


def test_what_is_in_the_teachers_pass():
    """A pass that is a product, attention, a mask, and something else; and a product outside."""
    x_EE = torch.randn(256, 256)
    q_BNLH = torch.randn(2, 2, 128, 64)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        x_EE @ x_EE
        with record_function(TARGET_RANGE), record_function(TEACHER_RANGE):
            with record_function(MASK_RANGE):
                mask_LL = torch.ones(128, 128, dtype=torch.bool).tril()
                (x_EE @ x_EE).sum()  # in the mask: it counts as that, once
            F.linear(x_EE, x_EE)
            F.scaled_dot_product_attention(q_BNLH, q_BNLH, q_BNLH, attn_mask=mask_LL)
            x_EE.exp()
    profiled = list(profile.events())

    def total(name):
        return sum(event.cpu_time_total for event in profiled if event.name == name) / 1e6

    ranges, inside = range_seconds(profiled, on_device=False)
    assert ranges[TARGET_RANGE] >= ranges[TEACHER_RANGE] == pytest.approx(total(TEACHER_RANGE))
    parts = {kind: seconds for (where, kind), seconds in inside.items() if where == TEACHER_RANGE}
    assert set(parts) == {"matrix products", "attention", "attention mask"} and len(inside) == len(parts)
    assert parts["attention mask"] == pytest.approx(total(MASK_RANGE))
    assert parts["attention"] == pytest.approx(total("aten::scaled_dot_product_attention"))
    products = [event.cpu_time_total / 1e6 for event in profiled if event.name == "aten::mm"]
    assert len(products) == 3  # outside, in the mask, and the one that counts
    assert parts["matrix products"] in [pytest.approx(seconds) for seconds in products]
    assert sum(parts.values()) < ranges[TEACHER_RANGE]
    ranges, inside = range_seconds(profiled, on_device=True)
    assert not any(ranges.values()) and not any(inside.values())  # no device has done anything
