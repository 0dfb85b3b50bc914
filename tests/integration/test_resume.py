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
    return jobs.probe(folder, config, *ARGS), jobs.metrics(folder)


@pytest.mark.parametrize(("kill_at", "resumes_at"), [(5, 4), (8, 7), (11, 10)], ids=["before", "at", "after"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_config, uninterrupted, kill_at, resumes_at):
    expected, expected_metrics = uninterrupted
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


def test_resuming_after_the_stop_loads_no_teacher(tmp_path, tiny_teacher):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher[0], teacher)
    config = tmp_path / "tiny.toml"
    config.write_text(jobs.TINY.format(folder=tmp_path / "out", teacher=teacher))
    jobs.kill(tmp_path / "out", config, *ARGS, step=8)
    for shard in teacher.glob("*.distcp"):
        shard.write_bytes(b"not weights any more")
    jobs.probe(tmp_path / "out", config, *ARGS)
