"""Names are registered once; `test_plan.py` has unknown ones, `test_strategies.py` those of another package."""

import pytest

from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS, register_layer_mapping
from let_plugin.alignment.losses import LOSSES, LossEntry, get_loss, register_loss
from let_plugin.alignment.projectors import DIMENSION_MATCHES, register_dimension_match
from let_plugin.alignment.schedules import SCHEDULES, register_schedule


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
        with pytest.raises(ValueError, match="'own' is registered already"):
            register("own", abs)
    finally:
        del own._entries["own"]
    if own is LOSSES:  # an entry point may give the plain function
        own.register("plain", len)
        assert get_loss("plain") == LossEntry(len)
        del own._entries["plain"]
