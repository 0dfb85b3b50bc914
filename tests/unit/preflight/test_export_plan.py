"""What an export is going to write, and what is wrong with it, before anything runs."""

import json
import shutil

import pytest

from let_plugin.config import LetConfig, PairConfig
from let_plugin.config.errors import ConfigError
from let_plugin.preflight.export_plan import bytes_per_token
from let_plugin.teacher.stored.features import Manifest
from tests.support.exports import plan_of
from tests.support.fields import set_all


def problems(config, *argv, **kwargs):
    with pytest.raises(ConfigError) as info:
        plan_of(config, *argv, **kwargs)
    return {problem.key: problem.message for problem in info.value.problems}


def test_rows_are_those_of_the_steps_until_the_stop(config, tmp_path):
    plan = plan_of(config, "--out", tmp_path)  # two steps of four rows
    assert plan.num_rows == plan.settings["rows_per_rank"] == 8
    assert plan.num_bytes == 8 * (64 * 32 * 2 + 16)
    set_all(config, training__global_batch_size=16, let__stop_step=3)
    plan = plan_of(config, "--out", tmp_path, "--data-parallel-degree", "2")
    assert (plan.num_rows, plan.settings["rows_per_rank"], plan.batch_size) == (48, 24, 4)


def test_a_pipelines_data_loader_yields_microbatches(config, tmp_path):
    set_all(config, parallelism__pipeline_parallel_degree=2, parallelism__pipeline_parallel_microbatch_size=2)
    plan = plan_of(config, "--out", tmp_path)
    assert (plan.batch_size, plan.num_rows) == (2, 8)
    assert plan.config.parallelism.pipeline_parallel_degree == 1
    assert config.parallelism.pipeline_parallel_degree == 2


@pytest.mark.parametrize(
    ("degrees", "argv", "num_processes", "expected"),
    [
        ({}, [], 1, 1),
        ({}, [], 4, 4),
        ({}, ["--data-parallel-degree", "4"], 2, 4),
        ({"data_parallel_shard_degree": 4, "data_parallel_replicate_degree": 2, "tensor_parallel_degree": 2}, [], 2, 8),
        ({"data_parallel_shard_degree": 2, "local": 2}, ["--data-parallel-degree", "2"], 1, 2),
    ],
)
def test_the_streams_are_those_of_the_run_to_come(config, tmp_path, degrees, argv, num_processes, expected):
    degrees = dict(degrees)
    set_all(config, training__local_batch_size=degrees.pop("local", 4))
    set_all(config, **{f"parallelism__{name}": degree for name, degree in degrees.items()})
    plan = plan_of(config, "--out", tmp_path, *argv, num_processes=num_processes)
    assert plan.settings["data_parallel_degree"] == expected


def test_streams_that_cannot_be_shared_evenly_are_refused(config, tmp_path):
    found = problems(config, "--out", tmp_path, "--data-parallel-degree", "3", num_processes=2)
    assert "2 processes cannot share 3" in found["--data-parallel-degree"]
    config.parallelism.data_parallel_shard_degree = 2
    found = problems(config, "--out", tmp_path, "--data-parallel-degree", "4")
    assert "the configuration has 2 data-parallel ranks" in found["--data-parallel-degree"]
    found = problems(config, "--out", tmp_path, "--data-parallel-degree", "0")
    assert found["--data-parallel-degree"] == "must be at least 1"


@pytest.mark.parametrize(
    ("argv", "key", "message"),
    [
        ([], "--out", "give the folder"),
        (["--out", "x", "--encoding", "int9"], "--encoding", "did you mean 'int8'"),
        (["--out", "x", "--encoding", "pca"], "--width", "give the number of channels"),
        (["--out", "x", "--encoding", "pca", "--width", "33"], "--width", "have 32 channels"),
        (["--out", "x", "--encoding", "random", "--width", "0"], "--width", "must be at least 1"),
        (["--out", "x", "--encoding", "pca", "--width", "3", "--fit-rows", "0"], "--fit-rows", "must be at least 1"),
        (["--out", "x", "--width", "3"], "--width", "bfloat16 keeps all channels"),
        (["--out", "x", "--rows-per-shard", "0"], "--rows-per-shard", "must be at least 1"),
    ],
)
def test_bad_options(config, argv, key, message):
    assert message in problems(config, *argv)[key]


def test_a_run_without_a_teacher_has_nothing_to_export(config):
    config.let.target = "labels"
    assert "no teacher" in problems(config, "--out", "x")["let.target"]
    config.let = LetConfig()
    assert "no teacher" in problems(config, "--out", "x")["let.enable"]


def test_mistakes_of_the_run_are_mistakes_of_its_export(config):
    set_all(config, let__weight=-1.0, let__teacher__path="/none")
    assert {"let.weight", "let.teacher.path"} <= set(problems(config, "--out", "x"))


def test_the_run_may_name_the_folder_already(config, tmp_path):
    config.let.teacher.features = str(tmp_path / "features")
    plan = plan_of(config)
    assert plan.folder == tmp_path / "features" and not plan.config.let.teacher.features
    assert config.let.teacher.features  # the run's own stays as it is


def test_the_report_has_the_storage_of_every_encoding(config, tmp_path):
    config.let.pairs = [PairConfig(student=0, teacher=0), PairConfig(student=1, teacher=1)]
    report = plan_of(config, "--out", tmp_path, "--encoding", "pca", "--width", "5").report()
    lines = [line.split() for line in report.splitlines() if line.startswith("  storage")]
    assert {line[5].strip(","): int(line[3]) for line in lines} == {
        "bfloat16": 2 * 2 * 32,
        "float32": 2 * 4 * 32,
        "int8": 2 * (32 + 4),
        "pca": 2 * 2 * 5,
        "random": 2 * 2 * 5,
    }
    assert [line[5] for line in lines if line[-1] == "chosen"] == ["pca,"]
    assert "rows       8 of 64 tokens, 512 tokens in all: 8 rows of each of 1 data-parallel ranks" in report


@pytest.mark.parametrize(
    ("encoding", "kept", "expected"),
    [("bfloat16", None, 40), ("float32", None, 80), ("int8", None, 24), ("pca", 6, 12)],
)
def test_bytes_per_token(encoding, kept, expected):
    assert bytes_per_token(encoding, 20, kept) == expected


def test_a_folder_with_something_else_in_it_is_left_alone(config, tmp_path):
    def refused(argv=()):
        with pytest.raises(ConfigError) as info:
            plan_of(config, "--out", folder, *argv).check_folder()
        (problem,) = info.value.problems
        return problem.message

    folder = tmp_path / "file"
    folder.write_text("")
    assert "a file" in refused()
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    assert "is not empty" in refused()
    folder = tmp_path / "export"
    folder.mkdir()
    settings = plan_of(config, "--out", folder).settings
    Manifest(settings=settings).write(folder)
    plan_of(config, "--out", folder).check_folder()  # goes on
    assert "other settings (encoding.name" in refused(["--encoding", "int8"])
    Manifest(settings=settings, result={}).write(folder)
    assert "it is complete" in refused()
    assert json.loads((folder / "manifest.json").read_text())["result"] == {}


def test_a_disk_that_is_too_small_is_refused(config, tmp_path, monkeypatch):
    plan = plan_of(config, "--out", tmp_path / "not" / "there" / "yet")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.num_bytes - 1))
    with pytest.raises(ConfigError, match=r"needs 32.1 KiB, and 32.1 KiB are free"):
        plan.check_folder()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.num_bytes))
    plan.check_folder()
