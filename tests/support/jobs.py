"""Runs real jobs in processes of their own, as users do."""

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from tests.support import fork_server

ROOT = Path(__file__).parents[2]

TINY = """\
base = "tests.support.tiny"
dump_folder = "{folder}"

[runtime]
device = "cpu"

[let]
weight = 0.5
stop_step = 4
teacher.path = "{teacher}"
teacher.spec = "tiny_teacher"
teacher.tokenizer_path = "let_plugin/demo/assets/tokenizer"
"""
# Options for two processes that see the same global batches as one.
LAYOUTS = {
    "FSDP2": ["--parallelism.data_parallel_shard_degree", 2, "--training.local_batch_size", 2],
    "pipeline": [
        *("--parallelism.pipeline_parallel_degree", 2, "--parallelism.pipeline_parallel_schedule", "1F1B"),
        *("--parallelism.pipeline_parallel_first_stage_less_layers", 0),
        *("--parallelism.pipeline_parallel_last_stage_less_layers", 0),
    ],
    "TP": ["--parallelism.tensor_parallel_degree", 2],
    "TP without SP": ["--parallelism.tensor_parallel_degree", 2, "--parallelism.no-enable_sequence_parallel"],
    "CP": ["--parallelism.context_parallel_degree", 2],
}


def tiny(folder, teacher, more=""):
    """Writes a TOML file that trains the tiny student with the tiny teacher, with `more` in its last table, `[let]`."""
    path = folder / "tiny.toml"
    path.write_text(TINY.format(folder=folder / "out", teacher=teacher) + more)
    return path


def environment(**extra):
    env = {k: v for k, v in os.environ.items() if k not in _OF_TORCHRUN}
    # One thread: the models are tiny, and pytest-xdist's workers run jobs side by side.
    env.setdefault("OMP_NUM_THREADS", "1")
    return {**env, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **extra}


_OF_TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
# Variables that are read when a job runs. All others may be read when something is imported.
_LATE = {"OMP_NUM_THREADS", "PROBE_KILL_AT_STEP", "PROBE_END_AT_STEP"}
# The fork server and what it forks off: a driver that has been called once is of no use after a fork.
_NO_ACCELERATOR = {"CUDA_VISIBLE_DEVICES": ""}
# Seconds on a slow machine: of a job, and of each of the many runs of one.
_JOB, _RUN = 600.0, 60.0


def run(module, *args, processes=1, check=True, timeout=_JOB, **env):
    """Runs `python -m module args` from the root of the repository, and waits for it: a `CompletedProcess`.

    In processes that are forked off with all imported (fork_server.py), with the environment that torchrun gives them;
    if one fails, the others are ended, and its exit code is the job's. With an environment variable that is read early,
    in new interpreters, several of them under torchrun. `check`: a failure is one of the test.
    """
    if env.keys() - _LATE:
        argv = [sys.executable]
        if processes > 1:
            # --standalone: torchrun itself takes a port that is free, and keeps it.
            argv += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        argv += ["-m", module, *map(str, args)]
        result = subprocess.run(argv, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout)
    else:
        result = _run_forked(module, [*map(str, args)], processes, environment(**env, **_NO_ACCELERATOR), timeout)
    if check:
        assert result.returncode == 0, _report(result)
    return result


def _run_forked(module, args, processes, env, timeout):
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        request = {"module": module, "args": args, "processes": processes, "env": env, "cwd": str(ROOT)}
        answer = _fork_server().run({**request, **files, "timeout": timeout})
        stdout, stderr = (Path(file).read_text(errors="replace") for file in files.values())
    codes = answer["codes"]
    if answer["code"] < 0 or (processes > 1 and any(codes)):
        stderr += "\n".join(["", *(f"rank {rank} exitcode: {code}" for rank, code in enumerate(codes))])
    result = subprocess.CompletedProcess([module, *args], answer["code"], stdout, stderr)
    assert not answer["timed_out"], _report(result)
    return result


@functools.cache
def _fork_server():
    client = fork_server.Client(ROOT, environment(**_NO_ACCELERATOR))
    atexit.register(client.close)
    return client


_CRASH = re.compile(r"exitcode: -(6|11)\b")  # SIGABRT or SIGSEGV, as torchrun reports them and this file


def _report(result):
    return f"{result.stdout[-4000:]}\n{_fatal_error(result)}\n{result.stderr[-6000:]}"


def _fatal_error(result):
    """What was printed when a signal ended Python, and its stacks, which what follows would push out of sight."""
    before, found, stacks = result.stderr.partition("Fatal Python error")
    return f"{before[-1000:]}{found}{stacks[:6000]}" if found else ""


def probe(folder, config, *args, processes=1, **env):
    """Runs a configuration under the probe (tests/support/probe.py) and returns what it recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "probe.pt"
    run("tests.support.probe", out, config, *args, "--dump_folder", folder, processes=processes, **env)
    return torch.load(out, weights_only=True, map_location="cpu")


def kill(folder, config, *args, step):
    """Runs a configuration under the probe until it is killed (SIGKILL) before `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    args = ("tests.support.probe", folder / "probe.pt", config, *args, "--dump_folder", folder)
    result = run(*args, check=False, PROBE_KILL_AT_STEP=str(step))
    assert result.returncode == -signal.SIGKILL, result.stderr[-4000:]


def train_many(folder, cases, processes, *, check=True, count=None, **env):
    """Trains `cases`, name -> (TOML file, arguments), one after the other in one job: name -> what the run did.

    See matrix.py; `folder` is for the files of the job, `count` what to count in each step (hot_path.py). With `check`,
    a run that fails is a failure of the test; without it, it did an "error".
    """
    rows = [
        {"name": name, "config": str(config), "args": [*map(str, args)], "count": count}
        | {"out": str(folder / f"{processes}-{i}.pt")}
        for i, (name, (config, args)) in enumerate(cases.items())
    ]
    listed = folder / f"{processes}.json"
    for can_run_again in (True, False):
        left = [row for row in rows if not Path(row["out"]).exists()]
        listed.write_text(json.dumps(left))
        timeout = _JOB + _RUN * len(left)
        result = run("tests.support.matrix", listed, processes=processes, check=False, timeout=timeout, **env)
        # As the Makefile's RERUN, without those that have been run.
        if not (can_run_again and _CRASH.search(result.stderr)):
            break
        print(f"a crash; the cases that are left are run again\n{_fatal_error(result)}")
    assert result.returncode == 0, _report(result)
    runs = {row["name"]: torch.load(row["out"], weights_only=True, map_location="cpu") for row in rows}
    for name, run_ in runs.items() if check else ():
        assert "error" not in run_, f"{name}: {run_['error']}"
    return runs


def seed_checkpoint(folder, config, *args):
    """Options that start a run from the initial weights of `config`, whatever its layout; writes them into `folder`.

    Without them, DTensor draws other random numbers on another number of ranks.
    """
    seed = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--dump_folder", folder]
    run("let_plugin.train", config, *args, *seed, "--let.no-enable")
    start = ["--checkpoint.enable", "--checkpoint.load_only"]
    return [*start, "--checkpoint.initial_load_path", folder / "checkpoint/step-0"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_teacher(folder, *, with_head=False, spec="tiny_teacher"):
    """Writes random weights of a spec as a torchtitan checkpoint (DCP), in fp32; returns them."""
    from let_plugin.teacher.titan.source import TEACHER_SPECS
    from tests.support import config_registry  # noqa: F401

    generator = torch.Generator().manual_seed(42)
    weights = TEACHER_SPECS.get(spec).make_spec().model.build().state_dict()
    for name, weight in weights.items():
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
        if "norm" in name:
            weight += 1
    # Sure of what it says, and wrong: its loss is above that of a student that is untrained.
    head = 3 * weights.pop("lm_head.weight")
    if with_head:
        weights["lm_head.weight"] = head
    dcp.save(weights, checkpoint_id=str(folder), no_dist=True)
    return weights


def make_hf_teacher(folder):
    """Writes a teacher of the tiny student's vocabulary that `transformers` reads; returns the options for it."""
    import transformers

    from tests.support.config_registry import VOCAB_SIZE

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=VOCAB_SIZE, **shape))
    model.save_pretrained(folder)
    return ["--let.teacher.spec", "", "--let.teacher.path", folder]


def relative_difference(got, expected):
    """|got - expected| / |expected| over a whole state dict, in fp64."""
    assert got.keys() == expected.keys()
    difference = sum((got[k].double() - expected[k].double()).square().sum() for k in expected)
    norm = sum(expected[k].double().square().sum() for k in expected)
    return (difference / norm).sqrt().item()
