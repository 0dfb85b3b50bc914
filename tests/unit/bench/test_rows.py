"""Rows carry where they come from, are only ever added, and are checked when they are read."""

import json
import subprocess

import pytest

import let_plugin
from let_plugin.bench import rows
from let_plugin.config.errors import ConfigError
from tests.support import jobs

CONFIG = f'base = "tests.support.tiny"\n[let.teacher]\npath = "{jobs.ROOT}/let_plugin/demo/assets"\n'


def make(**changes):
    fields = {"command": "let-bench throughput x.toml", "config": CONFIG, "seed": 0, "unit": "s/step"}
    return rows.row("throughput", **fields, values=[3.0, 1.0, 2.0], origin=rows.provenance(), pair=4) | changes


def test_results_do_not_make_a_checkout_dirty_and_code_does(tmp_path, monkeypatch):
    """In another checkout. An installed package has no commit, whatever repository it lies in."""
    package = tmp_path / "let_plugin"
    (package / "room").mkdir(parents=True)
    for name in ("__init__.py", "room/module.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.setattr(let_plugin, "__file__", str(package / "__init__.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]

    def commit():
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
            subprocess.run([*git, *command], check=True)
        return rows.provenance()

    installed, first = rows.provenance(), commit()
    (tmp_path / "x.jsonl").write_text("{}\n")
    second = commit()
    assert installed["commit"] is None and installed["code"] == first["code"] == second["code"]
    assert first["dirty"] is second["dirty"] is False and first["commit"] != second["commit"]
    (package / "room/module.py").write_text("x = 2\n")
    changed = rows.provenance()
    assert changed["dirty"] and changed["code"] != first["code"]
    assert {"torch", "torchtitan"} <= changed["versions"].keys()
    monkeypatch.setenv("PATH", "/nowhere")
    assert rows.provenance()["commit"] is None  # no git at all


def test_all_that_is_wrong_with_a_file_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    incomplete = {k: v for k, v in make().items() if k not in ("unit", "device")}
    assert 'path = "let_plugin/demo/assets"' in make()["config"]  # not where the package lies
    path.write_text("\n".join([json.dumps(make()), json.dumps(incomplete), "[1]", json.dumps(make())[:100]]))
    with pytest.raises(ConfigError) as error:
        rows.read(path)
    with pytest.raises(ValueError):
        rows.append(path, make(values=[1.0, float("nan")]))
    keys = [problem.key.removeprefix(str(path)) for problem in error.value.problems]
    assert keys == [":2", ":3", ":4"]
    assert "it has no device, unit" in str(error.value) and "cut off" in error.value.problems[-1].message
