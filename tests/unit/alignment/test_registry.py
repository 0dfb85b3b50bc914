"""Names are registered once; `test_plan.py` has unknown ones, `test_strategies.py` those of another package."""

import pytest

from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS, register_layer_mapping
from let_plugin.alignment.losses import LOSSES, LossEntry, get_loss, register_loss
from let_plugin.alignment.projectors import DIMENSION_MATCHES, register_dimension_match
from let_plugin.alignment.registry import Registry
from let_plugin.alignment.schedules import SCHEDULES, register_schedule


def test_names_are_sorted_unique_and_can_be_taken_back():
    registry = Registry("colour", "let_plugin.test_colours")
    for name in ("red", "blue", "green"):
        assert registry.register(name, name.upper()) == name.upper()
    assert list(registry) == ["blue", "green", "red"] and registry.get("red") == "RED"
    with pytest.raises(ValueError, match="colour 'red' is registered already"):
        registry.register("red", 2)
    assert registry.get("red") == "RED"
    del registry._entries["red"]
    assert "red" not in registry and "blue" in registry


@pytest.mark.parametrize(
    ("own", "register", "names"),
    [
        (SCHEDULES, register_schedule, "constant cosine linear"),
        (LAYER_MAPPINGS, register_layer_mapping, "L2E L2L L2M M2E M2L M2M uniform"),
        (LOSSES, register_loss, "cosine mse relational smooth_l1"),
        (
            DIMENSION_MATCHES,
            register_dimension_match,
            "interpolate least_squares linear mlp orthogonal procrustes random truncate_or_pad",
        ),
    ],
)
def test_what_is_there_and_one_of_ones_own(own, register, names):
    assert list(own) == names.split()
    register("own", len)
    try:
        assert own.get("own") in (len, LossEntry(len))
    finally:
        del own._entries["own"]
    if own is LOSSES:  # an entry point may give the plain function
        own.register("plain", len)
        assert get_loss("plain") == LossEntry(len)
        del own._entries["plain"]
