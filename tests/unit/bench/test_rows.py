"""Rows carry where they come from, are only ever added, and are checked when they are read."""

import json
import shutil
import subprocess
import sys

import pytest

from let_plugin.bench import rows
from let_plugin.config.errors import ConfigError
from tests.support import jobs

CONFIG = f'base = "tests.support.tiny"\n[let.teacher]\npath = "{jobs.ROOT}/let_plugin/demo/assets"\n'


def make(**changes):
    fields = {"command": "let-bench throughput x.toml", "config": CONFIG, "seed": 0, "unit": "s/step"}
    return rows.row("throughput", **fields, values=[3.0, 1.0, 2.0], origin=rows.provenance(), pair=4) | changes


def test_rows_come_back_as_they_were_and_in_order(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert rows.read(path) == []
    first, second = make(), make(values=[1.0, 1.0], quantiles={"0.5": 1.0})
    rows.append(path, first)
    before = path.read_bytes()
    rows.append(path, second)
    assert path.read_bytes().startswith(before)
    assert rows.read(path) == [first, second]
    assert first["quantiles"] == {"0": 1.0, "0.25": 1.5, "0.5": 2.0, "0.75": 2.5, "1": 3.0}
    assert first["pair"] == 4 and 'path = "let_plugin/demo/assets"' in first["config"]  # not where the package lies


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clean checkout of this package as it is, as a function (code) -> what it prints, run from there."""
    folder = tmp_path_factory.mktemp("clone")
    for room in ("bench", "config"):
        (folder / "let_plugin" / room).mkdir(parents=True)
    (folder / "let_plugin/config/__init__.py").touch()
    for name in ("__init__.py", "config/errors.py", "bench/__init__.py", "bench/rows.py"):
        shutil.copy(jobs.ROOT / "let_plugin" / name, folder / "let_plugin" / name)
    (folder / ".gitignore").write_text("__pycache__/\n")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    return folder


def provenance_in(package_folder, cwd, **env):
    code = "import json; from let_plugin.bench.rows import provenance; print(json.dumps(provenance()))"
    env = jobs.environment(PYTHONPATH=str(package_folder), **env)
    return json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=cwd, env=env, text=True))


def test_results_do_not_make_a_checkout_dirty_and_code_does(clone, tmp_path):
    first = provenance_in(clone, tmp_path)
    assert first["dirty"] is False and {"torch", "torchtitan"} <= first["versions"].keys()
    results = clone / "benchmarks/results"
    results.mkdir(parents=True)
    (results / "x.jsonl").write_text("{}\n")
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["add", "."], ["commit", "-qm", "results"]):
        subprocess.run([*git, *command], check=True)
    second = provenance_in(clone, tmp_path)
    assert second["dirty"] is False and second["commit"] != first["commit"] and second["code"] == first["code"]
    changed = []
    for text in ("", "x = 1\n"):
        with (clone / "let_plugin/config/errors.py").open("a") as file:
            file.write(f"{text}\n")
        changed.append(provenance_in(clone, tmp_path))
    assert all(origin["dirty"] for origin in changed)
    assert len({origin["code"] for origin in (first, *changed)}) == 3
    subprocess.run([*git, "checkout", "-q", "."], check=True)


def test_an_installed_package_has_no_commit_whatever_repository_it_lies_in(clone):
    """As in a virtual environment in a user's own repository."""
    site = clone / "__pycache__/site"
    shutil.copytree(clone / "let_plugin", site / "let_plugin")
    assert provenance_in(site, site)["commit"] is None
    assert provenance_in(clone, site.parent, PATH="/nowhere")["commit"] is None  # no git at all


def test_all_that_is_wrong_with_a_file_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    incomplete = {k: v for k, v in make().items() if k not in ("unit", "device")}
    path.write_text("\n".join([json.dumps(make()), json.dumps(incomplete), "[1]", json.dumps(make())[:100]]))
    with pytest.raises(ConfigError) as error:
        rows.read(path)
    with pytest.raises(ValueError, match="finite numbers, at least one"):
        rows.row("x", command="", config="", seed=0, unit="s", origin={}, values=[1.0, float("nan")])
    keys = [problem.key.removeprefix(str(path)) for problem in error.value.problems]
    assert keys == [":2", ":3", ":4"]
    assert "it has no device, unit" in str(error.value) and "cut off" in error.value.problems[-1].message
