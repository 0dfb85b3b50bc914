"""How long the rest will take, and what a run finds in its environment; runs that fail are in test_suite.py."""

from dataclasses import dataclass

import pytest

from let_plugin.bench import processes
from let_plugin.bench.processes import Progress, run_module, slug


@dataclass(frozen=True)
class Request:
    out: str


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_a_run_has_huge_pages_unless_the_user_does_without_and_no_rank_yet(tmp_path, monkeypatch, own, expected):
    code = "import json, os, sys; json.dump(dict(os.environ), open(json.load(open(sys.argv[1]))['out'], 'w'))"
    (tmp_path / "environment_of_a_run.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if own is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", own)
    environment = run_module("environment_of_a_run", Request(str(tmp_path / "out.json")), what="x", num_processes=1)
    assert environment["THP_MEM_ALLOC_ENABLE"] == expected and "RANK" not in environment


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
