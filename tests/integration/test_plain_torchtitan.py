"""Where LET does nothing, the run is plain torchtitan's, bit for bit: with no weight, and after the stop."""

import shutil

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

STOP, STEPS = 6, ["--training.steps", "12"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.keep_latest_k", "0"]
SAVE += ["--checkpoint.no-last-save-model-only"]


def assert_identical(got, expected):
    """The steps of `got`, which are the last of `expected`, and the final weights."""
    num_steps = len(got["gradients"])
    for step, (a, b) in enumerate(zip(got["gradients"], expected["gradients"][-num_steps:], strict=True)):
        for name in b:
            assert a[name].equal(b[name]), f"gradient of {name} at step {step} of {num_steps}"
    for name in expected["final"]:
        assert got["final"][name].equal(expected["final"][name]), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, what it did) of a run of torchtitan's own trainer."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, jobs.probe(folder, "--plain", *STEPS, *SAVE)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_teacher):
    """The same of a run with LET, which stops half-way."""
    folder = tmp_path_factory.mktemp("stopped")
    config = jobs.tiny(folder, tiny_teacher[0])
    return folder, jobs.probe(folder, config, *STEPS, *SAVE, "--let.stop-step", STOP)


def test_weight_zero_equals_torchtitans_own_entry_point(tmp_path, tiny_config, plain):
    let = jobs.probe(tmp_path / "let", tiny_config, *STEPS, "--let.weight", "0", "--let.stop-step", "9")
    assert len(let["gradients"]) == 12
    assert_identical(let, plain[1])
    logged = [(line["loss_metrics/global_avg_loss"], line["grad_norm"]) for line in jobs.metrics(tmp_path / "let")]
    assert logged == [(step["loss"], step["grad_norm"]) for step in plain[1]["logged"]]


def test_after_the_stop_nothing_of_let_is_left(tmp_path, stopped):
    """From a checkpoint of the stop step on, plain torchtitan takes the very steps that the run with LET took."""
    folder, let = stopped
    lines = jobs.metrics(folder)
    assert [line["let/active"] for line in lines] == [1.0] * STOP + [0.0] * (12 - STOP)
    assert all(line["let/lambda"] == 0 and "let/cosine" not in line for line in lines[STOP:])

    shutil.copytree(folder / f"checkpoint/step-{STOP}", tmp_path / f"plain/checkpoint/step-{STOP}")
    onwards = jobs.probe(tmp_path / "plain", "--plain", *STEPS, *SAVE)
    assert len(onwards["gradients"]) == 12 - STOP
    assert_identical(onwards, let)


def test_after_the_stop_neither_teacher_nor_its_library_is_needed(tmp_path, stopped):
    folder, config = tmp_path / "out", jobs.tiny(tmp_path, tmp_path / "deleted")
    shutil.copytree(stopped[0] / f"checkpoint/step-{STOP}", folder / f"checkpoint/step-{STOP}")
    hf = ["--let.teacher.spec", ""]  # a folder that `transformers` would read
    args = [*STEPS, *SAVE, "--let.stop-step", STOP, *hf]
    resumed = jobs.probe(folder, config, *args, PROBE_WITHOUT="transformers")
    assert len(resumed["gradients"]) == 12 - STOP
    assert_identical(resumed, stopped[1])


def test_let_goes_on_from_a_checkpoint_of_plain_torchtitan(tmp_path, tiny_config, plain):
    """What it measures for an adaptive stop is not in there: it measures afresh, and so many steps as it needs."""
    shutil.copytree(plain[0] / "checkpoint/step-6", tmp_path / "out/checkpoint/step-6")
    # A cosine is always below 2.
    adaptive = ["--let.adaptive-stop.criterion", "gradient", "--let.adaptive-stop.threshold", "2"]
    adaptive += ["--let.adaptive-stop.patience", "4", "--let.stop-step", "12"]
    jobs.run("let_plugin.train", tiny_config, *STEPS, *SAVE, *adaptive)
    lines = jobs.metrics(tmp_path / "out")
    assert [(line["step"], line["let/active"]) for line in lines] == [
        *((step, 1) for step in (7, 8, 9, 10)),
        *((step, 0) for step in (11, 12)),
    ]
