"""Where LET does nothing, the run is plain torchtitan's, bit for bit."""

import shutil

from tests.support import jobs

STEPS = ["--training.steps", "20"]


def assert_identical(got, expected):
    assert len(got["gradients"]) == len(expected["gradients"])
    for step, (a, b) in enumerate(zip(got["gradients"], expected["gradients"], strict=True)):
        for name in b:
            assert a[name].equal(b[name]), f"gradient of {name} at step {step}"
    for name in expected["final"]:
        assert got["final"][name].equal(expected["final"][name]), name


def logged(folder):
    return [(line["loss_metrics/global_avg_loss"], line["grad_norm"]) for line in jobs.metrics(folder)]


def test_weight_zero_equals_torchtitans_own_entry_point(tmp_path, tiny_config):
    plain = jobs.probe(tmp_path / "plain", "--plain", *STEPS)
    let = jobs.probe(tmp_path / "let", tiny_config, *STEPS, "--let.weight", "0", "--let.stop-step", "15")
    assert_identical(let, plain)
    assert logged(tmp_path / "let") == [(step["loss"], step["grad_norm"]) for step in plain["logged"]]


def test_after_the_stop_nothing_of_let_is_left(tmp_path, tiny_config):
    """From a checkpoint of the stop step on, plain torchtitan takes the very steps that the run with LET took."""
    checkpoints = ["--checkpoint.enable", "--checkpoint.interval", "5", "--checkpoint.keep_latest_k", "0"]
    let = jobs.probe(tmp_path / "let", tiny_config, *STEPS, *checkpoints, "--let.stop-step", "5")
    lines = jobs.metrics(tmp_path / "let")
    assert [line["let/active"] for line in lines] == [1.0] * 5 + [0.0] * 15
    assert all(line["let/lambda"] == 0 and "let/cosine" not in line for line in lines[5:])
    assert let["added_hooks"] == 0
    assert let["teacher_modules_alive"] == 0

    shutil.copytree(tmp_path / "let/checkpoint/step-5", tmp_path / "plain/checkpoint/step-5")
    plain = jobs.probe(tmp_path / "plain", "--plain", *STEPS, *checkpoints)
    assert len(plain["gradients"]) == 15
    assert_identical({**let, "gradients": let["gradients"][5:]}, plain)
