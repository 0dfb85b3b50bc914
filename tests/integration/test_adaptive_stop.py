"""An alignment that ends by what is measured: the same step on every rank, and after a resumption."""

import pytest

from tests.support import jobs

# A cosine is always below 2: it stops after as many measurements as `patience` says, one in each step.
GRADIENT = ["--let.adaptive-stop.criterion", "gradient", "--let.adaptive-stop.threshold", "2"]
GRADIENT += ["--let.adaptive-stop.patience", "4", "--let.stop-step", "8", "--training.steps", "8"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep-latest-k", "0"]
SAVE += ["--checkpoint.no-last-save-model-only"]
VALIDATION = ["--let.adaptive-stop.criterion", "validation", "--let.adaptive-stop.patience", "1"]
VALIDATION += ["--let.stop-step", "4", "--validator.enable", "--validator.freq", "2", "--validator.steps", "1"]
FSDP2 = ["--parallelism.data_parallel_shard_degree", "2", "--training.local_batch_size", "2"]
PIPELINE = ["--parallelism.pipeline_parallel_degree", "2"]


def active(folder):
    return [int(line["let/active"]) for line in jobs.metrics(folder) if "let/active" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "tiny.toml"
    config.write_text(jobs.TINY.format(folder=folder, teacher=tiny_teacher[0]))
    return folder, jobs.probe(folder, config, *GRADIENT, *SAVE)


def test_it_stops_by_the_gradients(uninterrupted):
    assert active(uninterrupted[0]) == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [3, 5, 7], ids=["before", "at", "after"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_config, uninterrupted, kill_at):
    jobs.kill(tmp_path / "out", tiny_config, *GRADIENT, *SAVE, step=kill_at)
    resumed = jobs.probe(tmp_path / "out", tiny_config, *GRADIENT, *SAVE)
    for name, weight in uninterrupted[1]["final"].items():
        assert resumed["final"][name].equal(weight), name
    assert active(tmp_path / "out")[-4:] == [0, 0, 0, 0]


@pytest.mark.slow
def test_a_resumed_run_repeats_the_validation_that_no_checkpoint_holds(tmp_path, tiny_config):
    """Validations after steps 1 and 2, each below; the second is the last that `patience` asks for."""
    args = [*VALIDATION, "--let.adaptive-stop.patience", "2", "--let.adaptive-stop.teacher-loss", "20", *SAVE]
    jobs.kill(tmp_path / "out", tiny_config, *args, step=2)
    jobs.probe(tmp_path / "out", tiny_config, *args)
    assert active(tmp_path / "out") == [1, 1, 0, 0]


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_no_error(tmp_path, tiny_config):
    """Without the state, it starts to measure afresh."""
    short = ["--let.stop-step", "2", "--training.steps", "2"]
    jobs.probe(tmp_path / "out", tiny_config, *short, *SAVE)
    jobs.probe(tmp_path / "out", tiny_config, *GRADIENT, *SAVE)
    assert active(tmp_path / "out") == [1, 1] + [1] * 4 + [0, 0]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path, tiny_config):
    jobs.probe(tmp_path / "out", tiny_config, *GRADIENT, *FSDP2, processes=2)
    assert active(tmp_path / "out") == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "processes"), [([], 1), (FSDP2, 2), (PIPELINE, 2)], ids=["single process", "FSDP2", "pipeline"]
)
@pytest.mark.parametrize(("teacher_loss", "expected"), [(20, [1, 0, 0, 0]), (2, [1, 1, 1, 1])])
def test_it_stops_when_the_held_out_loss_passes_the_teachers(
    tmp_path, tiny_config, layout, processes, teacher_loss, expected
):
    """An untrained student's loss is about 9. The first validation is after the first step."""
    args = [*VALIDATION, "--let.adaptive-stop.teacher-loss", teacher_loss, *layout]
    jobs.run("let_plugin.train", tiny_config, *args, processes=processes)
    assert active(tmp_path / "out") == expected


def test_what_it_needs_is_said(tmp_path, tiny_config):
    args = ["--let.adaptive-stop.criterion", "validation", "--let.adaptive-stop.patience", "0"]
    result = jobs.run("let_plugin.train", tiny_config, *args, check=False)
    assert result.returncode == 2
    for key in ("validator.enable", "let.adaptive_stop.teacher_loss", "let.adaptive_stop.patience"):
        assert f"{key} = " in result.stderr
