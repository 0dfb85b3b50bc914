"""Every file in train_configs/ is what it says, and what it trains on one process it trains on two."""

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

CONFIGS = sorted((jobs.ROOT / "train_configs").glob("*.toml"))
HAS_SMOLLM2 = (jobs.ROOT / "assets/smollm2").is_dir()
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="make fetch-smollm2")

DEMO = """
[runtime]
device = "cpu"

[dataloader]
type = "tests.support.data_loaders.GlobalOrderDataLoader"
dataset = "let_demo_train"
"""
DEMO_IN_FP32 = [
    *["--training.mixed_precision_param", "float32", "--training.steps", "4", "--let.stop-fraction", "1"],
    *["--training.local_batch_size", "4", "--compile.no-enable", "--validator.no-enable", "--metrics.log_freq", "1"],
]
SMOLLM2 = """
base = "tests.support.tiny_smollm2"
hf_assets_path = "assets/smollm2"
runtime.device = "cpu"

[let]
weight = 0.5
stop_step = 2
teacher.path = "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_passes_the_check(config, tmp_path):
    if "assets/smollm2" in config.read_text() and not HAS_SMOLLM2:
        pytest.skip("make fetch-smollm2")
    result = jobs.run(
        "let_plugin.train", config, "--check", "--training.steps", "10", "--dump_folder", tmp_path / "out"
    )
    assert "student" in result.stdout
    assert not (tmp_path / "out").exists()


def assert_two_processes_equal_one(tmp_path, config, *args):
    start = [*args, *jobs.seed_checkpoint(tmp_path / "seed", config, *args)]
    single = jobs.probe(tmp_path / "one", config, *start)
    # Fewer rows per rank: the global batch stays the same.
    several = jobs.probe(tmp_path / "two", config, *start, "--training.local_batch_size", 2, processes=2)

    # Later gradients are those of weights that differ by rounding, which AdamW amplifies, in plain torchtitan as well.
    assert jobs.relative_difference(several["gradients"][0], single["gradients"][0]) <= 1e-5
    assert jobs.relative_difference(several["final"], single["final"]) <= 1e-5
    for got, expected in zip(jobs.metrics(tmp_path / "two"), jobs.metrics(tmp_path / "one"), strict=True):
        assert got["let/cosine"] == pytest.approx(expected["let/cosine"], abs=1e-6)
        assert got["loss_metrics/global_avg_loss"] == pytest.approx(expected["loss_metrics/global_avg_loss"], rel=1e-5)


def test_two_processes_of_the_demo_equal_one(tmp_path):
    config = tmp_path / "demo.toml"
    config.write_text((jobs.ROOT / "train_configs/demo.toml").read_text() + DEMO)
    assert_two_processes_equal_one(tmp_path, config, *DEMO_IN_FP32)


@needs_smollm2
def test_two_processes_with_the_smollm2_teacher_equal_one(tmp_path):
    config = tmp_path / "smollm2.toml"
    config.write_text(SMOLLM2)
    assert_two_processes_equal_one(tmp_path, config, "--training.steps", "2")


@needs_smollm2
def test_smollm2_teaches_a_student_on_another_tokenizer(tmp_path):
    small = ["--training.steps", "3", "--let.stop-step", "2", "--training.seq_len", "64", "--metrics.log_freq", "1"]
    small += ["--compile.no-enable", "--validator.no-enable", "--dump_folder", tmp_path, "--runtime.device", "cpu"]
    small += ["--let.token_alignment.teacher_seq_len", "64"]
    result = jobs.run("let_plugin.train", "train_configs/cross_tokenizer.toml", *small)
    lines = jobs.metrics(tmp_path)
    assert [line["let/active"] for line in lines] == [1, 1, 0]
    assert abs(lines[0]["let/cosine"]) < 0.05  # untrained, the student knows nothing of the teacher
    assert "two tokenizers" in result.stdout and "TOKENIZERS_PARALLELISM" not in result.stderr
    assert all(0.95 < line["let/aligned_fraction"] <= 1 for line in lines[:2])
    assert "let/aligned_fraction" not in lines[2] and lines[0]["let/grad_ratio"] > 0
