"""How long the rest will take; runs that fail are in test_suite.py."""

import pytest

from let_plugin.bench import processes
from let_plugin.bench.processes import Progress, slug


def test_the_rest_is_as_long_as_the_last_of_each_label(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    progress = Progress(["a", "b", "a", "b"])
    now[0] = 10.0
    progress.after("first")
    assert capsys.readouterr().out == "[1/4] first (10 s; 0:00:30 left)\n"  # b is not known yet: as the average
    now[0] = 40.0
    progress.after("second")
    assert capsys.readouterr().out == "[2/4] second (30 s; 0:00:40 left)\n"
    progress.expect(["b", "b", "b"])
    now[0] = 80.0
    progress.after("third")
    assert capsys.readouterr().out == "[3/5] third (40 s; 0:01:20 left)\n"


@pytest.mark.parametrize(("label", "expected"), [("let@0.1", "let-0.1"), ("active 2.5% batch 4", "active-2.5-batch-4")])
def test_file_names(label, expected):
    assert slug(label) == expected
