"""A command line of let-bench on the tiny student."""

import pytest

from let_plugin.bench import cli

TOML = """\
base = "tests.support.tiny"
dump_folder = "{folder}/out"

[runtime]
device = "cpu"

[let]
weight = 0.5
stop_step = 2
teacher.spec = "demo_teacher"

[validator]
freq = 2
steps = 1
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    from let_plugin.runtime import data

    monkeypatch.setenv("WORLD_SIZE", "1")
    data.register()
    path = tmp_path / "run.toml"
    path.write_text(TOML.format(folder=tmp_path))
    return path


@pytest.fixture
def parsed(config_file, tmp_path):
    """(arguments, options of let-train) of a command line, as text; it writes into the test's folder."""

    def parse(command, text="", *more):
        files = ["--out", str(tmp_path / "rows.jsonl"), "--work-dir", str(tmp_path / "work")]
        return cli.parse([command, str(config_file), *files, *text.split(), *more])

    return parse
