"""An export: what it is going to write, what is wrong with it before anything runs, and what it writes."""

import functools
import shutil

import pytest

from let_plugin.config import LetConfig
from let_plugin.preflight import teacher_cli
from let_plugin.teacher.stored.features import Manifest
from let_plugin.teacher.stored.shards import shard_paths
from tests.support import exports
from tests.support.exports import plan_of
from tests.support.fields import set_all
from tests.support.problems import problem_of, problems_of


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


problems = functools.partial(problems_of, plan_of)


def export(*argv):
    teacher_cli.main(["export", *argv])


# The command line


def test_check_prints_what_it_takes_and_writes_nothing(tiny_config, folder, capsys):
    export(str(tiny_config), "--out", str(folder), "--check", "--let.stop-step", "2")
    printed = capsys.readouterr().out
    assert "  rows       8 of 64 tokens, 512 tokens in all: 8 rows of each of 1 data-parallel ranks" in printed
    assert f"  storage    {8 * (64 * 64 + 16) / 2**20:.1f} MiB: 64 B/token, bfloat16" in printed
    assert not folder.exists()


def test_bad_input_ends_with_its_mistakes_and_code_2(tiny_config, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        export(str(tiny_config), "--let.teacher.features=", "--let.weight", "heavy")
    printed = capsys.readouterr().err
    assert printed.startswith("let-teacher export: 2 problems in the configuration")
    assert "--out: give the folder" in printed and "command line: let.weight = 'heavy'" in printed
    assert not folder.exists()


# The plan


def test_rows_are_those_of_the_steps_until_the_stop(config, folder):
    plan = plan_of(config, "--out", folder)  # two steps of four rows
    assert plan.num_rows == plan.settings["rows_per_rank"] == 8
    assert plan.num_bytes == 8 * (64 * 32 * 2 + 16)
    assert plan_of(config, "--out", folder, "--encoding", "int8").num_bytes == 8 * (64 * (32 + 4) + 16)
    set_all(config, training__global_batch_size=16, let__stop_step=3, parallelism__data_parallel_shard_degree=2)
    plan = plan_of(config, "--out", folder)
    assert (plan.num_rows, plan.settings["rows_per_rank"], plan.settings["batch_size"]) == (48, 24, 4)


def test_a_pipelines_data_loader_yields_microbatches_and_the_run_may_name_the_folder(config, folder):
    set_all(config, parallelism__pipeline_parallel_degree=2, parallelism__pipeline_parallel_microbatch_size=2)
    config.let.teacher.features = str(folder)
    before = repr(config)
    plan = plan_of(config)
    assert (plan.settings["batch_size"], plan.num_rows, plan.folder) == (2, 8, folder)
    assert plan.config.parallelism.pipeline_parallel_degree == 1 and not plan.config.let.teacher.features
    assert repr(config) == before


@pytest.mark.parametrize(
    ("sharded", "replicated", "num_processes", "expected"),
    [(-1, 1, 4, 4), (4, 1, 2, 4), (4, 2, 2, 8), (3, 1, 2, "must be a multiple of the processes of the export, 2")],
)
def test_the_streams_are_those_of_the_run_to_come(config, folder, sharded, replicated, num_processes, expected):
    config.parallelism.data_parallel_shard_degree = sharded
    config.parallelism.data_parallel_replicate_degree = replicated
    if isinstance(expected, int):
        plan = plan_of(config, "--out", folder, num_processes=num_processes)
        assert plan.settings["data_parallel_degree"] == expected
    else:
        found = problems(config, "--out", folder, num_processes=num_processes)
        assert expected in found["parallelism.data_parallel_shard_degree"].message


def test_what_cannot_be_exported_is_refused(config):
    set_all(config, let__weight=-1.0, let__teacher__path="/none")
    assert {"let.weight", "let.teacher.path"} <= set(problems(config, "--out", "x"))  # the run's own mistakes
    set_all(config, let__signal="labels", let__control="shuffled_targets")
    found = problems(config, "--out", "x")
    assert "no teacher" in found["let.signal"].message and "export without it" in found["let.control"].message
    config.let = LetConfig()
    assert "no teacher" in problems(config, "--out", "x")["let.enable"].message


def test_a_folder_with_something_else_in_it_is_left_alone(config, tmp_path, monkeypatch):
    def refused(argv=()):
        return problem_of(lambda: plan_of(config, "--out", folder, *argv).check_folder()).message

    folder = tmp_path / "file"
    folder.write_text("")
    assert "is a file" in refused()
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    assert "is not empty" in refused()
    folder = tmp_path / "export"
    folder.mkdir()
    settings = plan_of(config, "--out", folder).settings
    Manifest(settings=settings).write(folder)
    plan = plan_of(config, "--out", folder)
    plan.check_folder()  # goes on
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.num_bytes - 1))
        assert "needs 0.0 MiB, and 0.0 MiB are free" in refused()
    assert "other settings (encoding)" in refused(["--encoding", "int8"])
    Manifest(settings=settings, result={"num_shards": 0}).write(folder)
    assert "it is complete" in refused()
    (folder / "manifest.json").write_text('{"format": 1}')
    assert "written in format 1, this version reads 2: export again elsewhere" in refused()


# The rows; `tests/integration/test_features.py` has several processes, and killed ones


def test_data_that_end_end_the_export(config, parallel_dims, folder):
    config.let.stop_step = config.training.steps = 10_000
    path = folder.parent / "short.txt"
    path.write_text("\n".join(f"A line of text with the number {i}." for i in range(60)))
    set_all(config, dataloader__infinite=False, dataloader__dataset="text_files", dataloader__dataset_path=str(path))
    manifest = exports.run(config, "--out", folder)
    assert 0 < manifest.result["num_rows"] < 60
    (path,) = shard_paths(folder)
    written = path.read_bytes()
    path.unlink()  # it is written again
    exports.run(config, "--out", folder)
    assert path.read_bytes() == written
