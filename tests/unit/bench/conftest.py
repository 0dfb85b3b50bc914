"""A suite of `let-bench converge` on the tiny student."""

import pytest

from let_plugin.bench.converge.methods import Resources
from let_plugin.bench.converge.plan import Options

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
def options(tmp_path):
    def make(**changes):
        values = {
            "methods": ["let", "rkd", "random_teacher"],
            "seeds": [0, 1],
            "tuning_seeds": [2],
            "weights": [],
            "test_dataset": "let_demo_test",
            "test_path": "",
            "resources": Resources(),
            "num_processes": 1,
            "out": tmp_path / "rows.jsonl",
            "work": tmp_path / "work",
        }
        return Options(**values | changes)

    return make
