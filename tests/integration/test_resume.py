"""A run that is killed (SIGKILL) and resumed ends as the run that was not, bit for bit."""

import shutil

import pytest

from tests.support import jobs

# Checkpoints after steps 3, 6, 9; the alignment ends before step 7 (six steps are taken by then).
ARGS = [
    *["--training.steps", "12", "--let.stop-step", "6", "--checkpoint.enable", "--checkpoint.interval", "3"],
    *["--validator.enable", "--validator.freq", "2", "--validator.steps", "2"],
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "tiny.toml"
    config.write_text(jobs.TINY.format(folder=folder, teacher=tiny_teacher[0]))
    return jobs.probe(folder, config, *ARGS), jobs.metrics(folder), folder


@pytest.mark.parametrize(("kill_at", "resumes_at"), [(5, 4), (8, 7), (11, 10)], ids=["before", "at", "after"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_config, uninterrupted, kill_at, resumes_at):
    expected, expected_metrics, _ = uninterrupted
    folder = tmp_path / "out"
    jobs.kill(folder, tiny_config, *ARGS, step=kill_at)

    resumed = jobs.probe(folder, tiny_config, *ARGS)

    assert len(resumed["gradients"]) == 12 - resumes_at + 1
    for name, weight in expected["final"].items():
        assert resumed["final"][name].equal(weight), name
    last = {(line["step"], "let/active" in line): line for line in jobs.metrics(folder)}
    for line in expected_metrics:
        got = last[line["step"], "let/active" in line]
        for key in ("loss_metrics/global_avg_loss", "validation_metrics/loss", "let/cosine", "let/lambda"):
            assert got.get(key) == line.get(key), (line["step"], key)


def copy_of_checkpoint(uninterrupted, tmp_path, step):
    """The folder of a run that goes on from that step of the uninterrupted one, and its TOML file, without teacher."""
    folder = tmp_path / "out"
    shutil.copytree(uninterrupted[2] / f"checkpoint/step-{step}", folder / f"checkpoint/step-{step}")
    config = tmp_path / "tiny.toml"
    config.write_text(jobs.TINY.format(folder=folder, teacher=tmp_path / "deleted"))
    return folder, config


def test_resuming_after_the_stop_needs_no_teacher_and_not_its_library_either(tmp_path, uninterrupted):
    folder, config = copy_of_checkpoint(uninterrupted, tmp_path, 6)
    hf = ["--let.teacher.spec", ""]  # a folder that `transformers` would read
    resumed = jobs.probe(folder, config, *ARGS, *hf, PROBE_WITHOUT="transformers")
    assert len(resumed["gradients"]) == 6
    for name, weight in uninterrupted[0]["final"].items():
        assert resumed["final"][name].equal(weight), name


@pytest.mark.slow
def test_resuming_before_the_stop_without_the_teacher_is_one_clear_error(tmp_path, uninterrupted):
    folder, config = copy_of_checkpoint(uninterrupted, tmp_path, 3)
    result = jobs.run("let_plugin.train", config, *ARGS, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "1 problem in the configuration" in result.stderr and "let.teacher.path" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]
