"""An alignment that ends when the student's loss passes the teacher's, measured: at the same step on every rank."""

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

pytestmark = pytest.mark.slow

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


@pytest.mark.strategies
@pytest.mark.parametrize(
    ("layout", "processes", "others"),
    [
        pytest.param([], 1, [], id="single process"),
        pytest.param(PIPELINE, 2, PAIRED, id="pipeline, paired"),
        pytest.param(FSDP2, 2, [], id="FSDP2", marks=pytest.mark.exhaustive),
        pytest.param(FSDP2, 2, PAIRED, id="FSDP2, paired", marks=pytest.mark.exhaustive),
    ],
)
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


def test_it_does_not_stop_before(tmp_path, tiny_config):
    result = jobs.run("let_plugin.train", tiny_config, *VALIDATION, "--let.adaptive-stop.teacher-loss", 2)
    assert measured_losses(result) == []
    assert active(tmp_path / "out") == [1, 1, 1, 1]


def test_a_resumed_run_repeats_the_validation_that_no_checkpoint_holds(tmp_path, measured_config):
    """Validations after steps 1 and 2, each below; the second is the last that `patience` asks for.

    The teacher's loss is in the checkpoint, and is not measured again.
    """
    args = [*VALIDATION, "--let.adaptive-stop.patience", "2", *SAVE]
    jobs.kill(tmp_path / "out", measured_config, *args, step=2)
    result = jobs.run("let_plugin.train", measured_config, *args)
    assert measured_losses(result) == [] and "validate step:  1" in _output(result)
    assert active(tmp_path / "out") == [1, 1, 0, 0]
