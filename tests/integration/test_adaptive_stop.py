"""An alignment that ends when the student's loss passes the teacher's, measured: at the same step on every rank."""

import re

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

VALIDATION = ["--let.adaptive-stop.criterion", "validation", "--let.adaptive-stop.patience", "2"]
VALIDATION += ["--let.stop-step", "4", "--validator.enable", "--validator.freq=2", "--validator.steps=1"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep-latest-k", "0"]
SAVE += ["--checkpoint.no-last-save-model-only"]
PAIRED = ["--let.dimension-match", "linear", "--let.loss", "smooth_l1", "--let.adaptive-stop.smoothing", "0.5"]


def write_config(folder, teacher):
    """The tiny run, validated on global batches that are the same in every layout."""
    loader = 'type = "tests.support.data_loaders.GlobalOrderDataLoader"\ndataset = "let_demo_validation"'
    return jobs.tiny(folder, teacher, f"\n[validator.dataloader]\n{loader}\nignore_every = 7\n")


def measured_losses(text):
    return [float(loss) for loss in re.findall(r"own loss on the validation data is ([\d.]+)", text)]


def test_it_stops_when_the_held_out_loss_passes_the_teachers(tmp_path, headed_teacher):
    config = write_config(tmp_path, headed_teacher[0])
    one = {"alone": [], "given a low one": ["--let.adaptive-stop.teacher-loss", "2"]}
    two = {"FSDP2": jobs.LAYOUTS["FSDP2"], "pipeline, paired": [*jobs.LAYOUTS["pipeline"], *PAIRED]}
    runs = {}
    for processes, cases in ((1, one), (2, two)):
        cases = {name: (config, [*VALIDATION, *args]) for name, args in cases.items()}
        runs |= jobs.train_many(tmp_path, cases, processes)
    expected = None
    for name, run in runs.items():
        is_low = name == "given a low one"
        losses = measured_losses("\n".join(run["messages"]))
        expected = expected or losses[0]
        assert losses == ([] if is_low else [pytest.approx(expected, abs=1e-4)]), name
        assert [line["let/active"] for line in run["logged"]] == ([1] * 4 if is_low else [1, 1, 0, 0]), name


def test_a_resumed_run_repeats_the_validation_that_no_checkpoint_holds(tmp_path, headed_teacher):
    """Validations after steps 1 and 2, each below; the second is the last that `patience` asks for. It is of all terms.

    The teacher's loss is in the checkpoint, and is not measured again.
    """
    config, folder = write_config(tmp_path, headed_teacher[0]), tmp_path / "out"
    own = 'weight = 0.5, stop_step = 4, adaptive_stop = {criterion = "validation", patience = 2}'
    terms = f'terms = [{{{own}}}, {{signal = "logits", {own}}}]'
    config.write_text(config.read_text().replace("weight = 0.5\n", "", 1).replace("stop_step = 4", terms))
    args = [*VALIDATION[-3:], *SAVE]
    jobs.kill(folder, config, *args, step=2)
    result = jobs.run("let_plugin.train", config, *args)
    output = result.stdout + result.stderr
    assert measured_losses(output) == [] and re.search(r"step +1/\d+  validation loss", output)
    assert [int(line["let/active"]) for line in jobs.metrics(folder) if "let/active" in line] == [1, 1, 0, 0]
