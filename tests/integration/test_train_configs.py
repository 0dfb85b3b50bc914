"""Every file in train_configs/ is what it says."""

import pytest

from tests.support import jobs

CONFIGS = sorted((jobs.ROOT / "train_configs").glob("*.toml"))
HAS_SMOLLM2 = (jobs.ROOT / "assets/smollm2").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_passes_the_check(config, tmp_path):
    if "smollm2" in config.stem and not HAS_SMOLLM2:
        pytest.skip("make fetch-smollm2")
    result = jobs.run("let_plugin.train", config, "--check", "--dump_folder", tmp_path / "out")
    assert "student" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="make fetch-smollm2")
def test_smollm2_teaches_a_student_on_its_own_tokenizer(tmp_path):
    small = ["--training.steps", "3", "--let.stop-step", "2", "--training.seq_len", "64", "--metrics.log_freq", "1"]
    small += ["--compile.no-enable", "--validator.no-enable", "--dump_folder", tmp_path, "--runtime.device", "cpu"]
    jobs.run("let_plugin.train", "train_configs/smollm2_teacher.toml", *small)
    lines = jobs.metrics(tmp_path)
    assert [line["let/active"] for line in lines] == [1, 1, 0]
    # Untrained, the student knows nothing of the teacher; one step later it has begun to turn to it.
    assert abs(lines[0]["let/cosine"]) < 0.05
    assert lines[1]["let/cosine"] > lines[0]["let/cosine"]
