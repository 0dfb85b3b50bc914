"""The house keeps its bounds (`make house` prints the numbers), and its mutations their lines."""

from tests import house, mutations


def test_no_bound_is_exceeded():
    measured = house.measure().items()
    assert not [f"{number:,} {name}: {place}" for name, (number, place) in measured if number > house.BOUNDS[name]]


def test_what_a_mutation_breaks_is_still_there():
    found = {m.old: (house.PACKAGE / m.file).read_text().count(m.old) for m in mutations.MUTATIONS}
    assert not [old for old, number in found.items() if number != 1]
