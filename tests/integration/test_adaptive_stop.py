"""An alignment that ends by what is measured: the same step on every rank, and after a resumption."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

from let_plugin.demo import TOKENIZER
from let_plugin.runtime import data
from tests.support import config_registry as tiny
from tests.support import jobs, reference
from tests.support.data_loaders import GlobalOrderDataLoader

# A cosine is always below 2: it stops after as many measurements as `patience` says, one in each step.
GRADIENT = ["--let.adaptive-stop.criterion", "gradient", "--let.adaptive-stop.threshold", "2"]
GRADIENT += ["--let.adaptive-stop.patience", "4", "--let.stop-step", "8", "--training.steps", "8"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep-latest-k", "0"]
SAVE += ["--checkpoint.no-last-save-model-only"]
VALIDATION = ["--let.adaptive-stop.criterion", "validation", "--let.adaptive-stop.patience", "1"]
VALIDATION += ["--let.stop-step", "4", "--validator.enable", "--validator.freq", "2", "--validator.steps", "1"]
FSDP2 = ["--parallelism.data_parallel_shard_degree", "2", "--training.local_batch_size", "2"]
PIPELINE = ["--parallelism.pipeline_parallel_degree", "2"]
PAIRED = ["--let.dimension-match", "linear", "--let.loss", "smooth_l1", "--let.adaptive-stop.smoothing", "0.5"]


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


@pytest.fixture(scope="module")
def headed(tmp_path_factory, tiny_teacher):
    """(folder of the tiny teacher with a head, its loss on the first global batch of the validation data)."""
    head_VE = torch.randn(tiny.VOCAB_SIZE, tiny.TEACHER_DIM, generator=torch.Generator().manual_seed(2)) / 2
    weights = {**tiny_teacher[1], "lm_head.weight": head_VE}
    folder = tmp_path_factory.mktemp("headed")
    dcp.save(weights, checkpoint_id=str(folder), no_dist=True)

    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    data.register()
    loader = GlobalOrderDataLoader.Config(dataset="let_demo_validation", ignore_every=7).build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=HuggingFaceTokenizer(tokenizer_path=TOKENIZER),
        seq_len=64,
        local_batch_size=4,
    )
    batch, labels_BL = next(iter(loader))
    _, states_BLE = reference.llama(weights, batch["input"], batch["positions"], **tiny.TEACHER)
    loss = F.cross_entropy((states_BLE @ head_VE.T).flatten(0, 1), labels_BL.flatten())
    return folder, loss.item()


@pytest.fixture
def measured_config(tmp_path, headed):
    """The tiny run with the headed teacher, validated on global batches that are the same in every layout."""
    path = tmp_path / "tiny.toml"
    loader = 'type = "tests.support.data_loaders.GlobalOrderDataLoader"\ndataset = "let_demo_validation"'
    text = jobs.TINY.format(folder=tmp_path / "out", teacher=headed[0])
    path.write_text(f"{text}\n[validator.dataloader]\n{loader}\nignore_every = 7\n")
    return path


def measured_losses(result):
    return [float(loss) for loss in re.findall(r"own loss on the validation data is ([\d.]+)", _output(result))]


def _output(result):
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.strategies
@pytest.mark.parametrize(
    ("layout", "processes"), [([], 1), (FSDP2, 2), (PIPELINE, 2)], ids=["single process", "FSDP2", "pipeline"]
)
@pytest.mark.parametrize("others", [[], pytest.param(PAIRED, marks=pytest.mark.exhaustive)], ids=["alone", "paired"])
def test_it_stops_when_the_held_out_loss_passes_the_teachers(
    tmp_path, measured_config, headed, layout, processes, others
):
    """The teacher's, which is measured, is above that of the student, which knows nothing yet: about 9."""
    assert headed[1] > 9.5
    args = [*VALIDATION, "--let.adaptive-stop.patience", "2", *layout, *others]
    result = jobs.run("let_plugin.train", measured_config, *args, processes=processes)
    losses = measured_losses(result)
    assert len(losses) == processes  # each rank says it
    assert losses == pytest.approx([headed[1]] * processes, abs=1e-4)
    assert active(tmp_path / "out") == [1, 1, 0, 0]
    if processes == 1:  # the same with the number given, beside other strategies
        given = ["--let.adaptive-stop.teacher-loss", losses[0], "--dump_folder", tmp_path / "given", *PAIRED]
        result = jobs.run("let_plugin.train", measured_config, *args, *given)
        assert measured_losses(result) == []
        assert active(tmp_path / "given") == [1, 1, 0, 0]


@pytest.mark.slow
def test_it_does_not_stop_before(tmp_path, tiny_config):
    jobs.run("let_plugin.train", tiny_config, *VALIDATION, "--let.adaptive-stop.teacher-loss", 2)
    assert active(tmp_path / "out") == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_resumed_run_repeats_the_validation_that_no_checkpoint_holds(tmp_path, measured_config):
    """Validations after steps 1 and 2, each below; the second is the last that `patience` asks for.

    The teacher's loss is in the checkpoint, and is not measured again.
    """
    args = [*VALIDATION, "--let.adaptive-stop.patience", "2", *SAVE]
    jobs.kill(tmp_path / "out", measured_config, *args, step=2)
    result = jobs.run("let_plugin.train", measured_config, *args)
    assert measured_losses(result) == [] and "validate step:  1" in _output(result)
    assert active(tmp_path / "out") == [1, 1, 0, 0]


def test_what_it_needs_is_said(tmp_path, tiny_config):
    args = ["--let.adaptive-stop.criterion", "validation", "--let.adaptive-stop.patience", "0"]
    args += ["--let.adaptive-stop.teacher-loss", "-1"]
    result = jobs.run("let_plugin.train", tiny_config, *args, check=False)
    assert result.returncode == 2
    for key in ("validator.enable", "let.adaptive_stop.teacher_loss", "let.adaptive_stop.patience"):
        assert f"{key} = " in result.stderr
