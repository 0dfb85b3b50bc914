"""A run that reads the teacher's states is the run that the teacher guides, bit for bit."""

import signal

import pytest

from tests.support import jobs, tokenizer_kinds

pytestmark = pytest.mark.slow

STOP, STEPS = 3, 5
# States of a bf16 teacher are stored as they are.
RUN = ["--let.teacher.dtype", "bfloat16", "--let.stop-step", STOP, "--training.steps", STEPS]
# Two layers, one on each stage of a pipeline: each stage reads its own.
PAIRS = "\n[[let.pairs]]\nstudent = 0\nteacher = 0\n[[let.pairs]]\nstudent = 3\nteacher = 1\n"

LOGITS = ["--let.signal", "logits", "--let.pairs", "[]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def config(folder, headed_teacher):
    return jobs.tiny(folder, headed_teacher[0], PAIRS)


@pytest.fixture(scope="module")
def cross(folder, config):
    """The run with a teacher of another tokenizer, of whose rows not every one has room for all tokens."""
    path = folder / "cross.toml"
    path.write_text(config.read_text())
    tokenizer_kinds.write_for_teacher(folder / "tokenizer", path, 64)
    return path


@pytest.fixture(scope="module")
def exported(folder, config, cross):
    """Name -> folder with the states of one data-parallel rank."""
    files = {"same": config, "cross": cross}
    for name, file in files.items():
        jobs.run("let_plugin.preflight.teacher_cli", "export", file, "--out", folder / name, *RUN)
    return {name: folder / name for name in files}


@pytest.fixture(scope="module")
def features_of_two_ranks(folder, config):
    args = [-1, config, "--out", folder / "2", *RUN, "--training.local_batch_size", "2"]
    jobs.run("tests.support.killed_export", *args, processes=2)
    return folder / "2"


def reading(features):
    """Options of a run that has the states and no teacher."""
    return ["--let.teacher.features", features, "--let.teacher.path", "", "--let.teacher.spec", ""]


def assert_equal(runs, name, expected):
    for weight, gradient in runs[expected]["gradients"].items():
        assert runs[name]["gradients"][weight].equal(gradient), weight
    logged = [
        [{key: value for key, value in step.items() if "per_second" not in key} for step in runs[which]["logged"]]
        for which in (name, expected)
    ]
    assert logged[0] == logged[1] and len(logged[0]) == STEPS
    metric = "let/cosine" if "let/cosine" in logged[0][0] else "let/distillation_loss"
    assert metric in logged[0][STOP - 1] and metric not in logged[0][STOP]


@pytest.fixture(scope="module")
def runs(folder, config, cross, exported):
    features, across = (reading(exported[name]) for name in ("same", "cross"))
    cases = {
        "teacher": (config, []),
        "features": (config, features),
        # A worker reads ahead, beyond the stop step: what is not there then is no error.
        "worker": (config, [*features, "--dataloader.num_workers", "1"]),
        "logits, teacher": (config, LOGITS),
        "logits, features": (config, [*LOGITS, "--let.teacher.features", exported["same"]]),  # the head is read anyway
        "cross, teacher": (cross, []),
        "cross, features": (cross, across),
    }
    cases = {name: (file, [*RUN, *args, "--dump_folder", folder / name]) for name, (file, args) in cases.items()}
    return jobs.train_many(folder, cases, processes=1)


def test_losses_and_gradients_are_those_of_the_run_with_the_teacher(runs):
    assert_equal(runs, "features", "teacher")
    assert_equal(runs, "worker", "teacher")
    assert_equal(runs, "logits, features", "logits, teacher")


def test_so_they_are_with_a_teacher_of_another_tokenizer(runs):
    assert_equal(runs, "cross, features", "cross, teacher")
    fractions = [runs[name]["logged"][0].get("let/aligned_fraction") for name in ("cross, features", "teacher")]
    assert 0.4 < fractions[0] < 0.9 and fractions[1] is None  # what does not fit has no state
    assert runs["cross, teacher"]["logged"][0]["let/cosine"] != runs["teacher"]["logged"][0]["let/cosine"]


def test_so_they_are_on_two_processes(tmp_path, config, exported, features_of_two_ranks):
    one, two = reading(exported["same"]), reading(features_of_two_ranks)
    cases = {
        f"{name}, {what}": (config, [*RUN, *jobs.LAYOUTS[name], *source, "--dump_folder", tmp_path / name / what])
        for name, states in (("FSDP2", two), ("pipeline", one))
        for what, source in (("teacher", []), ("features", states))
    }
    runs = jobs.train_many(tmp_path, cases, processes=2)
    assert_equal(runs, "FSDP2, features", "FSDP2, teacher")
    assert_equal(runs, "pipeline, features", "pipeline, teacher")


def test_one_process_and_a_killed_one_write_what_two_write(folder, config, features_of_two_ranks):
    out = folder / "killed"
    args = [config, "--out", out, *RUN, "--training.local_batch_size", "2"]
    args += ["--parallelism.data_parallel_shard_degree", "2"]
    # Three rows into the second of two streams of six rows.
    killed = jobs.run("tests.support.killed_export", 9, *args, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(out.glob("rows-*"))) == 4
    jobs.run("tests.support.killed_export", -1, *args)
    contents = [{path.name: path.read_bytes() for path in f.iterdir()} for f in (out, features_of_two_ranks)]
    assert contents[0] == contents[1] and len(contents[0]) == 7


def test_killed_and_resumed_equals_uninterrupted(tmp_path, config, exported, runs):
    args = [*RUN, *reading(exported["same"]), "--checkpoint.enable", "--checkpoint.interval", "1"]
    jobs.kill(tmp_path, config, *args, step=3)
    jobs.probe(tmp_path, config, *args)
    losses = {line["step"]: line["loss_metrics/global_avg_loss"] for line in jobs.metrics(tmp_path)}
    assert [losses[step + 1] for step in range(STEPS)] == [step["loss"] for step in runs["teacher"]["logged"]]
