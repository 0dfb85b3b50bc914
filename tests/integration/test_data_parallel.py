"""Several processes (gloo) against one: the same global batches must give the same gradients, weights and metrics."""

import pytest

from tests.support import jobs

LAYOUTS = {
    "fsdp2": ["--parallelism.data_parallel_shard_degree", "2"],
    "ddp": ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "1"],
    "fsdp2, accumulation": [],
    "fsdp2, partial_dtensor": ["--parallelism.spmd_backend", "partial_dtensor"],
    "hsdp": ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "2"],
}


DEMO = """
[runtime]
device = "cpu"

[dataloader]
type = "tests.support.data_loaders.GlobalOrderDataLoader"
dataset = "let_demo_train"
"""
DEMO_IN_FP32 = [
    *["--training.mixed_precision_param", "float32", "--training.steps", "4", "--let.stop-step", "4"],
    *["--training.local_batch_size", "4", "--compile.no-enable", "--validator.no-enable", "--metrics.log_freq", "1"],
]

SMOLLM2 = """
base = "tests.support.tiny_smollm2"
hf_assets_path = "assets/smollm2"
runtime.device = "cpu"

[let]
weight = 0.5
stop_step = 4
teacher.path = "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""


def assert_several_processes_equal_one(tmp_path, config, args=(), layout=(), processes=2):
    start = [*args, *jobs.seed_checkpoint(tmp_path / "seed", config, *args)]

    single = jobs.probe(tmp_path / "one", config, *start)
    # Fewer rows per rank: the global batch stays the same.
    rows = ["--training.local_batch_size", 4 // processes]
    several = jobs.probe(tmp_path / "several", config, *start, *rows, *layout, processes=processes)

    # Later gradients are those of weights that differ by rounding, which AdamW amplifies, in plain torchtitan as well.
    assert jobs.relative_difference(several["gradients"][0], single["gradients"][0]) <= 1e-5
    assert jobs.relative_difference(several["final"], single["final"]) <= 1e-5
    for got, expected in zip(jobs.metrics(tmp_path / "several"), jobs.metrics(tmp_path / "one"), strict=True):
        assert got["let/cosine"] == pytest.approx(expected["let/cosine"], abs=1e-6)
        assert got["loss_metrics/global_avg_loss"] == pytest.approx(expected["loss_metrics/global_avg_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_processes_equal_one(tmp_path, tiny_config, layout):
    args = ["--training.global_batch_size", "8"] if "accumulation" in layout else []
    processes = 4 if layout == "hsdp" else 2
    assert_several_processes_equal_one(tmp_path, tiny_config, args, LAYOUTS[layout], processes)


@pytest.mark.slow
def test_two_processes_of_the_demo_equal_one(tmp_path):
    config = tmp_path / "demo.toml"
    config.write_text((jobs.ROOT / "train_configs/demo.toml").read_text() + DEMO)
    assert_several_processes_equal_one(tmp_path, config, DEMO_IN_FP32)


@pytest.mark.slow
@pytest.mark.skipif(not (jobs.ROOT / "assets/smollm2").is_dir(), reason="make fetch-smollm2")
def test_two_processes_with_the_smollm2_teacher_equal_one(tmp_path):
    config = tmp_path / "smollm2.toml"
    config.write_text(SMOLLM2)
    assert_several_processes_equal_one(tmp_path, config)
