"""Every file in train_configs/ is what it says; and a teacher that is SmolLM2."""

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

CONFIGS = sorted((jobs.ROOT / "train_configs").glob("*.toml"))
HAS_SMOLLM2 = (jobs.ROOT / "assets/smollm2").is_dir()
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="make fetch-smollm2")

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


@needs_smollm2
def test_two_processes_with_the_smollm2_teacher_equal_one(tmp_path):
    config = tmp_path / "smollm2.toml"
    config.write_text(SMOLLM2)
    start = ["--training.steps", "2"]
    start += jobs.seed_checkpoint(tmp_path / "seed", config, *start)
    single = jobs.probe(tmp_path / "one", config, *start)
    # Fewer rows per rank: the global batch stays the same.
    several = jobs.probe(tmp_path / "two", config, *start, "--training.local_batch_size", 2, processes=2)
    # Later gradients are those of weights that differ by rounding, which AdamW amplifies, in plain torchtitan as well.
    assert jobs.relative_difference(several["gradients"][0], single["gradients"][0]) <= 1e-5
    assert jobs.relative_difference(several["final"], single["final"]) <= 1e-5
    for got, expected in zip(several["logged"], single["logged"], strict=True):
        assert got["let/cosine"] == pytest.approx(expected["let/cosine"], abs=1e-6)
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)


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
