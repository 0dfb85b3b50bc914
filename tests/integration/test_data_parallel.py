"""Two processes (gloo) against one: the same global batches must give the same gradients, weights and metrics."""

import pytest

from tests.support import jobs

LAYOUTS = {
    "fsdp2": ["--parallelism.data_parallel_shard_degree", "2"],
    "ddp": ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "1"],
    "fsdp2, accumulation": ["--training.global_batch_size", "8"],
    "fsdp2, partial_dtensor": ["--parallelism.spmd_backend", "partial_dtensor"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one(tmp_path, tiny_config, layout):
    # DTensor draws other random numbers on another number of ranks: both runs start from one seed checkpoint.
    seed = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--dump_folder", tmp_path / "seed"]
    jobs.run("let_plugin.train", tiny_config, *seed)
    start = ["--checkpoint.enable", "--checkpoint.initial_load_path", tmp_path / "seed/checkpoint/step-0"]

    single_args = ["--training.global_batch_size", "8"] if "accumulation" in layout else []
    single = jobs.probe(tmp_path / "one", tiny_config, *start, *single_args)
    # Half the rows per rank: the global batch stays the same.
    args = [*start, "--training.local_batch_size", "2", *LAYOUTS[layout]]
    double = jobs.probe(tmp_path / "two", tiny_config, *args, processes=2)

    for got, expected in zip(double["gradients"], single["gradients"], strict=True):
        assert jobs.relative_difference(got, expected) <= 1e-5
    assert jobs.relative_difference(double["final"], single["final"]) <= 1e-5
    for got, expected in zip(jobs.metrics(tmp_path / "two"), jobs.metrics(tmp_path / "one"), strict=True):
        assert got["let/cosine"] == pytest.approx(expected["let/cosine"], abs=1e-6)
        assert got["loss_metrics/global_avg_loss"] == pytest.approx(expected["loss_metrics/global_avg_loss"], rel=1e-5)
