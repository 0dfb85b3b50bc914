"""Which part of a profile counts as what."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, record_function

from let_plugin.bench.throughput.profiling import range_seconds
from let_plugin.guidance.guidance import TARGET_RANGE
from let_plugin.teacher.base import MASK_RANGE
from let_plugin.teacher.sharding import TEACHER_RANGE


@pytest.fixture(scope="module")
def profiled():
    """A teacher's pass that is a product, attention, a mask, and something else; and a product outside."""
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
    return list(profile.events())


def total(events, name):
    return sum(event.cpu_time_total for event in events if event.name == name) / 1e6


def test_what_is_in_the_teachers_pass(profiled):
    ranges, inside = range_seconds(profiled, on_device=False)
    assert ranges[TARGET_RANGE] >= ranges[TEACHER_RANGE] == pytest.approx(total(profiled, TEACHER_RANGE))
    parts = {kind: seconds for (where, kind), seconds in inside.items() if where == TEACHER_RANGE}
    assert set(parts) == {"matrix products", "attention", "attention mask"} and len(inside) == len(parts)
    assert parts["attention mask"] == pytest.approx(total(profiled, MASK_RANGE))
    assert parts["attention"] == pytest.approx(total(profiled, "aten::scaled_dot_product_attention"))
    products = [event.cpu_time_total / 1e6 for event in profiled if event.name == "aten::mm"]
    assert len(products) == 3  # outside, in the mask, and the one that counts
    assert parts["matrix products"] in [pytest.approx(seconds) for seconds in products]
    assert sum(parts.values()) < ranges[TEACHER_RANGE]


def test_nothing_of_it_has_taken_a_devices_time(profiled):
    ranges, inside = range_seconds(profiled, on_device=True)
    assert not any(ranges.values()) and not any(inside.values())
