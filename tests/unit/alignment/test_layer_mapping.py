import pytest
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS


@pytest.mark.parametrize(
    ("name", "depth", "block"),
    [("L2E", 9, 2), ("L2E", 6, 1), ("L2E", 24, 7), ("L2E", 1, 0), ("L2M", 9, 5), ("L2L", 9, 8), ("L2L", 1, 0)],
)
def test_blocks_of_the_mappings(name, depth, block):
    pair = LAYER_MAPPINGS.get(name, key="let.layer_mapping")(depth, 12)
    assert (pair.student, pair.teacher) == (block, -1)


@given(st.integers(1, 200), st.integers(1, 200))
def test_every_mapping_names_a_block_in_order_of_depth(student_depth, teacher_depth):
    blocks = [LAYER_MAPPINGS.get(n, key="")(student_depth, teacher_depth).student for n in ("L2E", "L2M", "L2L")]
    assert blocks == sorted(blocks)
    assert blocks[0] >= 0 and blocks[-1] == student_depth - 1
    # At one third of the depth or less, unless the model is too shallow for that.
    assert 3 * (blocks[0] + 1) <= student_depth or blocks[0] == 0
