"""The wheel carries everything that the package needs, and runs from another folder."""

import subprocess
import sys

import pytest

from tests.support import jobs

CONFIG = """\
base = "let_plugin.demo.student"
dump_folder = "run"
runtime.device = "cpu"

[let]
teacher.spec = "demo_teacher"

[training]
local_batch_size = 2
seq_len = 32
steps = 2
"""


@pytest.mark.slow
def test_a_wheel_installs_and_trains_elsewhere(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(jobs.ROOT)], check=True)
    (wheel,) = wheels.glob("let_plugin-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (tmp_path / "run.toml").write_text(CONFIG)

    # Before the editable installation on the path, so that the wheel's own files are the ones that run.
    result = subprocess.run(
        [sys.executable, "-c", "import let_plugin.train as t; print(t.__file__); t.main(['run.toml'])"],
        cwd=tmp_path,
        env=jobs.environment(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
    )

    assert result.returncode == 0, result.stderr[-4000:]
    assert str(site) in result.stdout.splitlines()[0]
    assert (site / "let_plugin/bench/report.html.jinja").is_file()
    assert jobs.metrics(tmp_path / "run")[0]["let/active"] == 1
