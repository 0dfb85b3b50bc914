"""LET's own state in a checkpoint, written by the distributed checkpointer as torchtitan writes it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.config.errors import ConfigError
from let_plugin.preflight import checks as preflight
from let_plugin.runtime import checkpoint

SETTINGS = {"threshold": 0.0, "smoothing": 0.9, "patience": 2}


def read(config, name="own"):
    stop = AdaptiveStop(**SETTINGS)
    checkpoint.restore(name, stop, config, step=2)
    return stop


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("place", ["the run's own", "remote", "the one that it starts from"])
def test_it_is_read_from_the_checkpoint_that_the_run_resumes_from(config, tmp_path, place, caplog):
    if place == "remote":
        config.dump_folder = "memory://run"
    path = f"{config.dump_folder}/{config.checkpoint.folder}/step-2"
    if place == "the one that it starts from":
        path = config.checkpoint.initial_load_path = str(tmp_path / "elsewhere")
    stop = AdaptiveStop(**SETTINGS)
    for step in range(3):
        stop.update(-0.1 * step, next_step=step)
    dcp.save({"own": stop, "model": {"weight": torch.ones(2)}}, checkpoint_id=path, no_dist=True)

    got = read(config)
    assert same(got, stop) and got.stop_step == stop.stop_step == 2
    assert same(read(config, name="other"), AdaptiveStop(**SETTINGS))  # a checkpoint without it changes nothing
    assert "has no other: it starts afresh at step 2" in caplog.text


@pytest.mark.parametrize("identity", [[3, 10], [3, 11, 12]])
def test_the_state_of_something_else_is_refused(config, tmp_path, identity):
    folder = tmp_path / "out" / config.checkpoint.folder / "step-2"
    stop = AdaptiveStop(**SETTINGS)
    dcp.save({"own": checkpoint.Identified(stop, [3, 11])}, checkpoint_id=str(folder), no_dist=True)
    checkpoint.restore("own", checkpoint.Identified(stop, [3, 11]), config, 2)  # its own
    with pytest.raises(ConfigError, match=r"step-2 has a own of other settings .* start afresh"):
        checkpoint.restore("own", checkpoint.Identified(stop, identity), config, 2)


def test_a_run_of_another_data_parallel_degree_is_refused_before_a_teacher_is_opened(config, trainer, tmp_path):
    """torchtitan itself ends in an assertion, when the teacher's states may have been opened."""
    config.dataloader = HuggingFaceTextDataLoader.Config(dataset="let_demo_train")
    loader = config.dataloader.build(
        dp_world_size=4, dp_rank=0, tokenizer=trainer.tokenizer, seq_len=64, local_batch_size=4
    )
    state = {"train_state": {"step": 2}, "dataloader": loader}
    dcp.save(state, checkpoint_id=f"{config.dump_folder}/{config.checkpoint.folder}/step-2", no_dist=True)
    config.checkpoint.enable = True
    config.training.steps, config.let.stop_step = 8, 4
    config.let.teacher.features = str(tmp_path / "nowhere")
    path = f"{config.dump_folder}/{config.checkpoint.folder}/step-2"
    assert checkpoint.find(config) == checkpoint.Resumption(path, 2, 4)
    with pytest.raises(ConfigError, match="has the places in the data of 4 data-parallel ranks, and this run has 2"):
        preflight.run(config, world_size=2)
    config.checkpoint.exclude_from_loading = ["dataloader"]
    with pytest.raises(ConfigError, match=r"^let\.teacher\.features = [^\n]*$"):
        preflight.run(config, world_size=2)
