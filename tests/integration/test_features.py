"""A run that reads the teacher's states is the run that the teacher guides, bit for bit."""

import signal

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

STOP, STEPS = 3, 5
# States of a bf16 teacher are stored as they are.
RUN = ["--let.teacher.dtype", "bfloat16", "--let.stop-step", STOP, "--training.steps", STEPS]
FSDP2 = ["--parallelism.data_parallel_shard_degree", "2", "--training.local_batch_size", "2"]
PIPELINE = [
    "--parallelism.pipeline_parallel_degree",
    "2",
    "--parallelism.pipeline_parallel_first_stage_less_layers",
    "0",
]
PIPELINE += ["--parallelism.pipeline_parallel_last_stage_less_layers", "0"]
# Two layers, one on each stage of a pipeline: each stage reads its own.
PAIRS = "\n[[let.pairs]]\nstudent = 0\nteacher = 0\n[[let.pairs]]\nstudent = 3\nteacher = 1\n"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("features")
    (folder / "tiny.toml").write_text(jobs.TINY.format(folder=folder / "out", teacher=tiny_teacher[0]) + PAIRS)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def features(folder, config):
    """The states of one data-parallel rank."""
    jobs.run("let_plugin.teacher.export", config, "--out", folder / "1", *RUN, **ONE_THREAD)
    return folder / "1"


@pytest.fixture(scope="module")
def features_of_two_ranks(folder, config):
    args = [config, "--out", folder / "2", "--rows-per-shard", "2", *RUN, "--training.local_batch_size", "2"]
    jobs.run("let_plugin.teacher.export", *args, processes=2, **ONE_THREAD)
    return folder / "2"


def reading(features):
    """Options of a run that has the states and no teacher."""
    return ["--let.teacher.features", features, "--let.teacher.path", "", "--let.teacher.spec", ""]


def assert_equal(runs, name, expected):
    for run in (runs[name], runs[expected]):
        assert "error" not in run, run["error"]
    for weight, gradient in runs[expected]["gradients"].items():
        assert runs[name]["gradients"][weight].equal(gradient), weight
    logged = [
        [{key: value for key, value in step.items() if "per_second" not in key} for step in runs[which]["logged"]]
        for which in (name, expected)
    ]
    assert logged[0] == logged[1] and len(logged[0]) == STEPS
    assert "let/cosine" in logged[0][STOP - 1] and "let/cosine" not in logged[0][STOP]


@pytest.fixture(scope="module")
def runs(folder, config, features):
    cases = {
        "teacher": (config, [*RUN, "--dump_folder", folder / "a"]),
        "features": (config, [*RUN, *reading(features), "--dump_folder", folder / "b"]),
        # A worker reads ahead, beyond the stop step: what is not there then is no error.
        "worker": (config, [*RUN, *reading(features), "--dataloader.num_workers", "1", "--dump_folder", folder / "c"]),
    }
    return jobs.train_many(folder, cases, processes=1)


@pytest.mark.parametrize("name", ["features", "worker"])
def test_losses_and_gradients_are_those_of_the_run_with_the_teacher(runs, name):
    assert_equal(runs, name, "teacher")


def test_so_they_are_on_two_processes(tmp_path, config, features, features_of_two_ranks):
    one, two = reading(features), reading(features_of_two_ranks)
    cases = {}
    for name, layout, source in (("FSDP2", FSDP2, two), ("pipeline", PIPELINE, one)):
        cases[f"{name}, teacher"] = (config, [*RUN, *layout, "--dump_folder", tmp_path / name])
        cases[f"{name}, features"] = (config, [*RUN, *layout, *source, "--dump_folder", tmp_path / name / "features"])
    runs = jobs.train_many(tmp_path, cases, processes=2)
    assert_equal(runs, "FSDP2, features", "FSDP2, teacher")
    assert_equal(runs, "pipeline, features", "pipeline, teacher")


def test_one_process_and_a_killed_one_write_what_two_write(folder, config, features_of_two_ranks):
    out = folder / "killed"
    args = [config, "--out", out, "--rows-per-shard", "2", *RUN, "--training.local_batch_size", "2"]
    args += ["--data-parallel-degree", "2"]
    # Three rows into the second of two streams of six rows.
    killed = jobs.run("tests.support.killed_export", 9, *args, check=False, **ONE_THREAD)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(out.glob("rows-*"))) == 4
    jobs.run("let_plugin.teacher.export", *args, **ONE_THREAD)
    contents = [{path.name: path.read_bytes() for path in f.iterdir()} for f in (out, features_of_two_ranks)]
    assert contents[0] == contents[1] and len(contents[0]) == 7


def test_killed_and_resumed_equals_uninterrupted(tmp_path, config, features, runs):
    args = [*RUN, *reading(features), "--checkpoint.enable", "--checkpoint.interval", "1"]
    jobs.kill(tmp_path, config, *args, step=3)
    jobs.probe(tmp_path, config, *args)
    losses = {line["step"]: line["loss_metrics/global_avg_loss"] for line in jobs.metrics(tmp_path)}
    assert [losses[step + 1] for step in range(STEPS)] == [step["loss"] for step in runs["teacher"]["logged"]]
