"""A projector that learns, in a run's checkpoints: resumed exactly, elsewhere too, and exported nowhere."""

import pytest
import torch.distributed.checkpoint as dcp

from let_plugin.guidance.projectors import PROJECTOR
from tests.support import jobs

# Checkpoints after steps 3, 6, 9 and 12; the alignment ends before step 10.
LEARN = ["--let.dimension-match", "linear", "--let.stop-step", "9", "--training.steps", "12"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.keep-latest-k", "0"]
FULL = ["--checkpoint.no-last-save-model-only"]


def keys(folder, step):
    return set(dcp.FileSystemReader(folder / f"checkpoint/step-{step}").read_metadata().state_dict_metadata)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "tiny.toml"
    config.write_text(jobs.TINY.format(folder=folder, teacher=tiny_teacher[0]))
    return folder, jobs.probe(folder, config, *LEARN, *SAVE, *FULL)


def test_it_learns(tmp_path, tiny_config, uninterrupted):
    """Without it, the run ends elsewhere."""
    plain = jobs.probe(tmp_path / "out", tiny_config, *LEARN[2:])
    assert jobs.relative_difference(plain["final"], uninterrupted[1]["final"]) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [5, 11], ids=["before the stop", "after it"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_config, uninterrupted, kill_at):
    jobs.kill(tmp_path / "out", tiny_config, *LEARN, *SAVE, *FULL, step=kill_at)
    resumed = jobs.probe(tmp_path / "out", tiny_config, *LEARN, *SAVE, *FULL)
    for name, weight in uninterrupted[1]["final"].items():
        assert resumed["final"][name].equal(weight), name


@pytest.mark.slow
def test_only_checkpoints_of_the_alignment_hold_it_and_the_student_is_plain_torchtitans(tmp_path, uninterrupted):
    folder, _ = uninterrupted
    jobs.probe(tmp_path / "plain", "--plain", *LEARN[4:], *SAVE, *FULL)
    plain = keys(tmp_path / "plain", 6)
    assert {name.split(".")[0] for name in keys(folder, 6) - plain} == {f"{PROJECTOR}_0"}
    assert plain <= keys(folder, 6)
    assert keys(folder, 12) == plain  # step 9's was written before the step that found the alignment at its end

    jobs.probe(tmp_path / "final", "--plain", *LEARN[4:], *SAVE)
    weights_only = keys(tmp_path / "final", 12)
    config = folder / "tiny.toml"
    jobs.probe(tmp_path / "let", config, *LEARN[:2], "--let.stop-step", "3", "--training.steps", "3", *SAVE)
    assert keys(tmp_path / "let", 3) == weights_only

    # Plain torchtitan goes on from a checkpoint with a projector in it.
    (tmp_path / "onwards/checkpoint").mkdir(parents=True)
    (folder / "checkpoint/step-6").rename(tmp_path / "onwards/checkpoint/step-6")
    jobs.probe(tmp_path / "onwards", "--plain", *LEARN[4:], *SAVE, *FULL)
    (tmp_path / "onwards/checkpoint/step-6").rename(folder / "checkpoint/step-6")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "rows"),
    [
        ({"tensor": 2}, 4),
        ({"pipeline": 2}, 4),
        ({"data": 2}, 2),
    ],
    ids=["TP", "PP", "FSDP2"],
)
def test_resumed_at_another_parallelism_it_trains_on_alike(tmp_path, uninterrupted, degrees, rows):
    folder, _ = uninterrupted
    # torchtitan's data loader cannot resume on another number of data-parallel ranks: here both start it afresh.
    start = ["--checkpoint.enable", "--checkpoint.load-only", "--checkpoint.no-initial-load-model-only"]
    start += ["--checkpoint.initial-load-path", folder / "checkpoint/step-3"]
    start += ["--checkpoint.exclude-from-loading", "dataloader"]
    config = folder / "tiny.toml"
    one = jobs.probe(tmp_path / "one", config, *LEARN, *start)

    layout = {"tensor": "tensor_parallel", "pipeline": "pipeline_parallel", "data": "data_parallel_shard"}
    ((kind, degree),) = degrees.items()
    args = [f"--parallelism.{layout[kind]}_degree", degree, "--training.local-batch-size", rows]
    args += ["--training.disable-cuda-graphs", "--parallelism.pipeline_parallel_first_stage_less_layers", "0"]
    several = jobs.probe(tmp_path / "several", config, *LEARN, *start, *args, processes=2)

    assert len(several["gradients"]) == len(one["gradients"]) == 9
    got, expected = jobs.metrics(tmp_path / "several"), jobs.metrics(tmp_path / "one")
    assert [line.get("let/cosine") for line in got] == pytest.approx(
        [line.get("let/cosine") for line in expected], abs=1e-5, nan_ok=True
    )
    for line, reference in zip(got, expected, strict=True):
        assert line["loss_metrics/global_avg_loss"] == pytest.approx(
            reference["loss_metrics/global_avg_loss"], rel=1e-5
        )
