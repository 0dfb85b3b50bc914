"""A command line of let-bench on the tiny student."""

import pytest

from let_plugin.bench import cli
from let_plugin.runtime import data
from tests.support import jobs


@pytest.fixture
def config_file(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    data.register()
    return jobs.tiny(tmp_path, tiny_teacher[0], "[validator]\nfreq = 2\nsteps = 1\n")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.fixture
def parsed(config_file, tmp_path):
    """(arguments, options of let-train) of a command line, as text; it writes into the test's folder."""

    def parse(command, text="", *more):
        files = ["--out", str(tmp_path / "rows.jsonl"), "--work-dir", str(tmp_path / "work")]
        return cli.parse([command, str(config_file), *files, *text.split(), *more])

    return parse
