"""torchtitan's fake process group: one rank of many, in one process."""

import math

import pytest
import torch
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torchtitan.tools.logging import logger

from let_plugin import train
from let_plugin.preflight import checks as preflight
from tests.support import jobs
from tests.support.fields import set_all
from tests.support.problems import problems_of


@pytest.fixture
def fake_ranks(monkeypatch):
    """The environment of a dry run of 32 ranks; whatever process group it makes is gone in the end."""
    monkeypatch.setenv("NGPU", "32")
    monkeypatch.setenv("RANK", "0")
    _clear_sharding_prop_cache()  # it keeps device meshes of earlier groups
    handlers = logger.handlers[:]
    yield
    logger.handlers[:] = handlers  # torchtitan's writes to the output that pytest has captured, and closes
    _clear_sharding_prop_cache()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_student_of_the_paper_shrunk_trains_under_the_plan(fake_ranks, tmp_path, tiny_teacher, capfd):
    config = tmp_path / "run.toml"
    text = jobs.TINY.format(folder=tmp_path / "out", teacher=tiny_teacher[0])
    config.write_text(text.replace("tests.support.tiny", "tests.support.tiny_paper"))
    options = ["--training.steps", "3", "--let.stop-step", "2", "--training.seq_len", "64", "--metrics.log_freq", "1"]
    options += ["--training.local_batch_size", "2", "--comm.mode", "fake_backend"]
    options += ["--parallelism.data_parallel_replicate_degree", "4", "--parallelism.tensor_parallel_degree", "2"]
    train.main([str(config), *options])
    lines = jobs.metrics(tmp_path / "out")
    assert [line["let/active"] for line in lines] == [1, 1, 0]
    assert all(math.isfinite(line["let/cosine"]) for line in lines[:2])
    printed = capfd.readouterr()
    mesh = "mesh with parallelism: pp=1, dp_replicate=4, dp_shard=4, cp=1, tp=2, ep=1"
    assert mesh in printed.out + printed.err


@pytest.mark.parametrize("num_ranks", ["", "four", "0"])
def test_an_environment_that_makes_no_sense(config, monkeypatch, num_ranks):
    monkeypatch.setenv("NGPU", num_ranks)
    set_all(config, comm__mode="fake_backend", let__weight=-1.0)
    problems = problems_of(preflight.run, config)
    assert problems.keys() == {"comm.mode", "let.weight"} and "NGPU=32 let-train" in problems["comm.mode"].message
