import pytest
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS, LayerPair, block_at_depth, uniform


def mapping(name, *depths, **options):
    return LAYER_MAPPINGS.get(name)(*depths, **options)


@pytest.mark.parametrize(
    ("name", "depth", "block"),
    [("L2E", 9, 2), ("L2E", 6, 1), ("L2E", 24, 7), ("L2E", 1, 0), ("L2M", 9, 5), ("L2L", 9, 8), ("L2L", 1, 0)],
)
def test_blocks_of_the_student(name, depth, block):
    assert mapping(name, depth, 12) == [LayerPair(block, 11)]
    assert mapping(f"M{name[1:]}", depth, 12) == [LayerPair(block, 7)]


def test_the_letters_stand_for_depths_that_can_be_chosen():
    assert mapping("M2E", 12, 10, early=0.5, middle=0.1) == [LayerPair(5, 0)]
    assert mapping("L2L", 12, 10, late=0.5) == [LayerPair(5, 4)]
    for depth in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"^late must be a depth between 0"):
            mapping("L2E", 12, 10, late=depth)


@given(st.integers(1, 200), st.integers(1, 200))
def test_every_mapping_names_blocks_in_order_of_depth(student_depth, teacher_depth):
    for teacher in "LM":
        pairs = [mapping(f"{teacher}2{student}", student_depth, teacher_depth)[0] for student in "EML"]
        blocks = [pair.student for pair in pairs]
        assert blocks == sorted(blocks) and blocks[0] >= 0 and blocks[-1] == student_depth - 1
        # At one third of the depth or less, unless the model is too shallow for that.
        assert 3 * (blocks[0] + 1) <= student_depth or blocks[0] == 0
        (layer,) = {pair.teacher for pair in pairs}
        assert layer == teacher_depth - 1 if teacher == "L" else 0 <= layer < teacher_depth


@given(st.integers(1, 300), st.integers(1, 12), st.data())
def test_a_block_at_an_exact_fraction_is_that_of_exact_arithmetic(num_blocks, parts, data):
    part = data.draw(st.integers(1, parts))
    assert block_at_depth(num_blocks, part / parts) == max(num_blocks * part // parts, 1) - 1


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 20))
def test_uniform_pairs_are_distinct_ordered_and_end_with_the_last_layers(student_depth, teacher_depth, num_pairs):
    pairs = uniform(student_depth, teacher_depth, num_pairs=num_pairs)
    assert len(pairs) == min(student_depth, teacher_depth, num_pairs)
    students, teachers = [p.student for p in pairs], [p.teacher for p in pairs]
    assert students == sorted(set(students)) and teachers == sorted(set(teachers))
    assert (students[-1], teachers[-1]) == (student_depth - 1, teacher_depth - 1)
    assert sum(p.weight for p in pairs) == pytest.approx(1)
