"""The house keeps its bounds; `make house` prints the numbers."""

from tests import house


def test_no_bound_is_exceeded():
    measured = house.measure().items()
    assert not [f"{number:,} {name}: {place}" for name, (number, place) in measured if number > house.BOUNDS[name]]
