"""A run with all state that there is: killed, or asked to end, and resumed, it ends as one that was not, bit for bit.

A projector that learns, a running mean of the teacher's states, measurements for an adaptive stop, a teacher with
another tokenizer, and a worker that reads ahead.
"""

import shutil

import pytest
import torch.distributed.checkpoint as dcp

from tests.support import jobs, tokenizer_kinds
from tests.support.reference import PROJECTOR

pytestmark = pytest.mark.slow

# Checkpoints after steps 3, 6, 9 and 12; the alignment ends before step 7: a cosine is always below 2.
STATE = """\
teacher.center = true
[[let.terms]]
dimension_match = "linear"
weight_by = "gradient"
weight = 0.5
stop_step = 10
adaptive_stop = {criterion = "gradient", threshold = 2.0, patience = 6, smoothing = 0.5}
[[let.terms]]
signal = "labels"
weight_by = "gradient"
stop_step = 4
"""
RUN = ["--training.steps", "12", "--dataloader.num_workers", "1"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.keep-latest-k", "0"]
FULL = ["--checkpoint.no-last-save-model-only"]
VALIDATE = ["--validator.enable", "--validator.freq", "2", "--validator.steps", "2"]
EQUAL = ("loss_metrics/global_avg_loss", "validation_metrics/loss", "let/active", "let/aligned_fraction")
EQUAL += ("let.states/lambda", "let.states/cosine", "let.labels/lambda", "let.labels/auxiliary_loss")


def write_config(folder, tiny_teacher):
    config = jobs.tiny(folder, tiny_teacher[0], STATE)
    config.write_text(config.read_text().replace("weight = 0.5\nstop_step = 4\n", "", 1))
    tokenizer_kinds.write_for_teacher(folder / "tokenizer", config, 128)
    return config


def keys(folder, step):
    return set(dcp.FileSystemReader(folder / f"checkpoint/step-{step}").read_metadata().state_dict_metadata)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_teacher):
    """(folder, TOML file, what it did)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(folder, tiny_teacher)
    return folder / "out", config, jobs.probe(folder / "out", config, *RUN, *SAVE, *FULL, *VALIDATE)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_teacher, uninterrupted):
    expected_folder, _, expected = uninterrupted
    config, folder = write_config(tmp_path, tiny_teacher), tmp_path / "out"
    args = [*RUN, *SAVE, *FULL, *VALIDATE]
    assert expected["workers_have_threads"]  # after the trial of two tokenizers
    jobs.kill(folder, config, *args, step=5)
    # With a signal to its process group, to which the loader's worker does not belong.
    ended = jobs.probe(folder, config, *args, PROBE_END_AT_STEP="8")
    assert len(ended["gradients"]) == 5 and keys(folder, 8) == keys(expected_folder, 9)
    jobs.kill(folder, config, *args, step=11)
    resumed = jobs.probe(folder, config, *args)

    assert len(resumed["gradients"]) == 3
    for name, weight in expected["final"].items():
        assert resumed["final"][name].equal(weight), name
    last = {(line["step"], "let/active" in line): line for line in jobs.metrics(folder)}
    lines = jobs.metrics(expected_folder)
    assert [line["let/active"] for line in lines if "let/active" in line] == [1] * 6 + [0] * 6
    for line in lines:
        got = last[line["step"], "let/active" in line]
        assert [got.get(key) for key in EQUAL] == [line.get(key) for key in EQUAL], line["step"]


def test_one_of_three_ranks_is_asked_to_end(tmp_path, tiny_teacher):
    """They end after the same step, and go on bit for bit, with a vocabulary and widths that they do not divide."""
    config = jobs.tiny(tmp_path, tiny_teacher[0], 'teacher.center = true\ndimension_match = "linear"\n')
    config.write_text(config.read_text().replace("support.tiny", "support.tiny_odd"))
    args = ["--training.steps", "6", "--let.stop-step", "5", *FULL, "--checkpoint.async-mode", "async", *SAVE]
    expected = jobs.probe(tmp_path / "whole", config, *args, processes=3)
    folder = tmp_path / "ended"
    ended = jobs.probe(folder, config, *args, processes=3, PROBE_END_AT_STEP="3")
    resumed = jobs.probe(folder, config, *args, processes=3)

    assert [len(run["gradients"]) for run in (ended, resumed)] == [4, 2]
    assert [line["step"] for line in jobs.metrics(folder)] == [1, 2, 3, 4, 5, 6]
    for name, weight in expected["final"].items():
        assert resumed["final"][name].equal(weight), name


def test_only_checkpoints_of_the_alignment_hold_its_state_and_the_student_is_plain_torchtitans(tmp_path, uninterrupted):
    folder, config, _ = uninterrupted
    jobs.probe(tmp_path / "plain", "--plain", "--training.steps", "3", *SAVE, *FULL)
    plain = keys(tmp_path / "plain", 3)
    own = {step: {name.split(".")[0] for name in keys(folder, step) - plain} for step in (3, 12)}
    assert plain < keys(folder, 3) and plain < keys(folder, 12)
    assert {PROJECTOR.removesuffix(".weight"), "let_adaptive_stop"} < own[3]  # and the mean
    assert own[12] == {"let_adaptive_stop"}  # that it has stopped

    # A checkpoint of the weights alone holds those of the student alone, though it was written during the alignment.
    short = ["--training.steps", "3", "--let.terms.0.stop_step", "3", "--let.terms.1.stop_step", "3"]
    short += ["--dump_folder", tmp_path / "short"]
    jobs.probe(tmp_path / "short", config, *RUN, *SAVE, *short)
    assert "lm_head.weight" in keys(tmp_path / "short", 3) < plain

    # Plain torchtitan goes on from a checkpoint with LET's state in it.
    shutil.copytree(folder / "checkpoint/step-6", tmp_path / "onwards/checkpoint/step-6")
    onwards = jobs.probe(tmp_path / "onwards", "--plain", *RUN, *SAVE, *FULL)
    assert len(onwards["gradients"]) == 6


def test_resumed_at_another_parallelism_it_trains_on_alike(tmp_path, uninterrupted):
    folder, config, _ = uninterrupted
    # torchtitan's data loader cannot resume on another number of data-parallel ranks: here both start it afresh.
    start = ["--checkpoint.enable", "--checkpoint.load-only", "--checkpoint.no-initial-load-model-only"]
    start += ["--checkpoint.initial-load-path", folder / "checkpoint/step-3"]
    start += ["--checkpoint.exclude-from-loading", "dataloader"]
    start += ["--dump_folder", tmp_path]
    several = {name: (config, [*RUN, *start, *jobs.LAYOUTS[name]]) for name in ("TP", "pipeline", "FSDP2")}
    several = jobs.train_many(tmp_path, several, 2)
    one = jobs.train_many(tmp_path, {"one": (config, [*RUN, *start])}, 1)["one"]
    for name, run in {"one": one, **several}.items():
        assert [step["let/active"] for step in run["logged"]] == [1] * 3 + [0] * 6, name
        for got, expected in zip(run["logged"], one["logged"], strict=True):
            for key in {"loss", "let.states/cosine", "let/aligned_fraction"} & expected.keys():
                assert got[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (name, key)
