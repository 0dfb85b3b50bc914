"""What an export writes, in this process."""

import pytest
import torch

from let_plugin.config import PairConfig
from let_plugin.guidance.guidance import Guidance
from let_plugin.preflight import export_rows
from let_plugin.teacher.stored import shards
from let_plugin.teacher.stored.features import Features
from let_plugin.teacher.stored.shards import RowReader, row_keys, shard_paths
from tests.support import exports
from tests.support.fields import set_all


@pytest.fixture
def batches(trainer):
    """The batches that the run reads until the stop step, on the CPU."""
    loader = iter(trainer.dataloader)
    return [next(loader) for _ in range(2)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_stored_is_what_the_teacher_says_beside_the_student(config, trainer, batches, folder):
    config.let.pairs = [PairConfig(student=0, teacher="embedding"), PairConfig(student=1, teacher=1)]
    exports.run(config, "--out", folder, "--encoding", "float32")
    reader = RowReader(folder, ["embedding.values", "1.values"])
    teacher = Guidance(trainer, 0).teacher
    for input_dict, _ in batches:
        columns, missing = reader.read(row_keys(input_dict))
        assert missing == []
        stored = torch.cat([columns["embedding.values"], columns["1.values"]], dim=-1)
        assert torch.equal(stored, teacher(input_dict["input"], input_dict["positions"]))


def test_rows_that_come_again_are_stored_once(config, parallel_dims, folder, monkeypatch):
    whole = export_rows._batches

    def twice(plan, provider, stream):
        yield from whole(plan, provider, stream)
        yield from whole(plan, provider, stream)

    monkeypatch.setattr(export_rows, "_batches", twice)
    manifest = exports.run(config, "--out", folder)
    assert manifest.result["num_rows"] == 8


@pytest.mark.parametrize("encoding", [["--encoding", "int8"], ["--encoding", "pca", "--width", "8", "--fit-rows", "6"]])
def test_interrupted_and_continued_is_uninterrupted(config, parallel_dims, tmp_path, encoding, monkeypatch):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    argv = ["--rows-per-shard", "3", *encoding]
    exports.run(config, "--out", whole, *argv)

    class PowerCutError(Exception):
        pass

    def cut(self, *args, left=[5]):  # noqa: B006
        if left[0] == 0:
            raise PowerCutError
        left[0] -= 1
        add(self, *args)

    add = shards.ShardWriter.add
    monkeypatch.setattr(shards.ShardWriter, "add", cut)
    with pytest.raises(PowerCutError):
        exports.run(config, "--out", interrupted, *argv)
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(shard_paths(interrupted)) == 1
    assert "result" in contents(interrupted)["manifest.json"].decode()
    (interrupted / ".rows-00000-000001.safetensors.part").write_bytes(b"half a file")

    num_run = []
    states = export_rows._states
    monkeypatch.setattr(export_rows, "_states", lambda *args: num_run.append(1) or states(*args))
    exports.run(config, "--out", interrupted, *argv)
    assert contents(interrupted) == contents(whole)
    assert len(num_run) == 2  # both batches have new rows; pca is not fitted again


def test_the_run_goes_on_where_only_the_last_line_of_the_manifest_is_missing(
    config, parallel_dims, folder, monkeypatch
):
    manifest = exports.run(config, "--out", folder)
    before = contents(folder)
    type(manifest)(settings=manifest.settings).write(folder)
    monkeypatch.setattr(export_rows, "_states", None)  # nothing is left for the teacher
    exports.run(config, "--out", folder)
    assert contents(folder) == before


def test_the_streams_are_those_of_the_ranks(config, parallel_dims, folder):
    set_all(config, training__local_batch_size=2)
    exports.run(config, "--out", folder, "--data-parallel-degree", "2")
    reader = RowReader(folder, ["1.values"])
    for rank in range(2):
        assert len(shard_paths(folder, rank)) == 1
        loader = config.dataloader.build(
            dp_world_size=2,
            dp_rank=rank,
            tokenizer=config.tokenizer.build(tokenizer_path=config.hf_assets_path),
            seq_len=64,
            local_batch_size=2,
        )
        batches = iter(loader)
        for _ in range(2):
            assert reader.read(row_keys(next(batches)[0]))[1] == []


def test_data_that_end_end_the_export(config, parallel_dims, folder):
    config.let.stop_step = config.training.steps = 10_000
    config.dataloader.infinite = False
    config.dataloader.dataset_path = str(folder.parent / "short.txt")
    config.dataloader.dataset = "text_files"
    (folder.parent / "short.txt").write_text("\n".join(f"A line of text with the number {i}." for i in range(60)))
    manifest = exports.run(config, "--out", folder)
    assert 0 < manifest.result["num_rows"] < 60


@pytest.mark.parametrize(
    ("encoding", "least"),
    [
        (["--encoding", "float32"], 1 - 1e-6),
        (["--encoding", "bfloat16"], 1 - 2**-16),
        (["--encoding", "int8"], 0.999),
    ],
)
def test_the_manifest_says_how_well_the_states_are_stored(config, parallel_dims, folder, encoding, least):
    manifest = exports.run(config, "--out", folder, *encoding)
    fidelity = manifest.result["fidelity"]["1"]
    assert fidelity["tokens"] == 512
    assert least < fidelity["percentile_1"] <= fidelity["mean"] <= 1
    assert Features(str(folder)).fidelity == manifest.result["fidelity"]


def test_a_wider_projection_is_a_better_one_and_pca_is_better_than_chance(config, parallel_dims, tmp_path):
    def mean(name, width):
        folder = tmp_path / f"{name}-{width}"
        manifest = exports.run(config, "--out", folder, "--encoding", name, "--width", width)
        return manifest.result["fidelity"]["1"]["mean"]

    means = [mean("pca", width) for width in (4, 16, 32)]
    assert means == sorted(means) and means[-1] > 0.9999
    assert means[1] > mean("random", 16)
