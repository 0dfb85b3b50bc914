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

VALIDATION = ["--let.adaptive-stop.criterion", "validation", "--let.adaptive-stop.patience", "2"]
VALIDATION += ["--let.stop-step", "4", "--validator.enable", "--validator.freq", "2", "--validator.steps", "1"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep-latest-k", "0"]
SAVE += ["--checkpoint.no-last-save-model-only"]
FSDP2 = ["--parallelism.data_parallel_shard_degree", "2", "--training.local_batch_size", "2"]
PIPELINE = ["--parallelism.pipeline_parallel_degree", "2"]
PAIRED = ["--let.dimension-match", "linear", "--let.loss", "smooth_l1", "--let.adaptive-stop.smoothing", "0.5"]


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


def write_config(folder, teacher):
    """The tiny run, validated on global batches that are the same in every layout."""
    path = folder / "tiny.toml"
    loader = 'type = "tests.support.data_loaders.GlobalOrderDataLoader"\ndataset = "let_demo_validation"'
    text = jobs.TINY.format(folder=folder / "out", teacher=teacher)
    path.write_text(f"{text}\n[validator.dataloader]\n{loader}\nignore_every = 7\n")
    return path


def measured_losses(text):
    return [float(loss) for loss in re.findall(r"own loss on the validation data is ([\d.]+)", text)]


def test_it_stops_when_the_held_out_loss_passes_the_teachers(tmp_path, headed):
    """The teacher's, which is measured, is above that of the student, which knows nothing yet: about 9."""
    assert headed[1] > 9.5
    config = write_config(tmp_path, headed[0])
    one = {"alone": [], "given a low one": ["--let.adaptive-stop.teacher-loss", "2"]}
    two = {"FSDP2": FSDP2, "pipeline, paired": [*PIPELINE, *PAIRED]}
    runs = {}
    for processes, cases in ((1, one), (2, two)):
        cases = {name: (config, [*VALIDATION, *args]) for name, args in cases.items()}
        runs |= jobs.train_many(tmp_path, cases, processes)
    for name, run in runs.items():
        assert "error" not in run, run["error"]
        is_low = name == "given a low one"
        losses = measured_losses("\n".join(run["messages"]))
        assert losses == ([] if is_low else [pytest.approx(headed[1], abs=1e-4)]), name
        assert [line["let/active"] for line in run["logged"]] == ([1] * 4 if is_low else [1, 1, 0, 0]), name


def test_a_resumed_run_repeats_the_validation_that_no_checkpoint_holds(tmp_path, headed):
    """Validations after steps 1 and 2, each below; the second is the last that `patience` asks for.

    The teacher's loss is in the checkpoint, and is not measured again.
    """
    config, folder = write_config(tmp_path, headed[0]), tmp_path / "out"
    jobs.kill(folder, config, *VALIDATION, *SAVE, step=2)
    result = jobs.run("let_plugin.train", config, *VALIDATION, *SAVE)
    output = result.stdout + result.stderr
    assert measured_losses(output) == [] and "validate step:  1" in output
    assert [int(line["let/active"]) for line in jobs.metrics(folder) if "let/active" in line] == [1, 1, 0, 0]
