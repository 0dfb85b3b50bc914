"""Every file in train_configs/ is what it says; and a run with SmolLM2 as the teacher."""

import pytest

from let_plugin.config.load import read, resolve
from let_plugin.preflight.checks import examine
from let_plugin.runtime import data
from tests.support import jobs

pytestmark = pytest.mark.slow

CONFIGS = sorted((jobs.ROOT / "train_configs").glob("*.toml"))
ALL = [path for path in sorted((jobs.ROOT / "train_configs").rglob("*.toml")) if path.stem != "methods"]
# Keys of what may not be on this machine.
FILES = {"hf_assets_path", "let.teacher.path", "dataloader.dataset_path", "checkpoint.load_step"}
FILES |= {"validator.dataloader.dataset_path"}
HAS_SMOLLM2 = (jobs.ROOT / "assets/smollm2").is_dir()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_passes_the_check(config, tmp_path):
    if "assets/smollm2" in config.read_text() and not HAS_SMOLLM2:
        pytest.skip("make fetch-smollm2")
    result = jobs.run("let_plugin.train", config, "--check", "--dump_folder", tmp_path / "out")
    assert "student" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ALL, ids=lambda path: path.stem)
def test_a_run_of_it_can_be_shortened(config, monkeypatch):
    monkeypatch.chdir(jobs.ROOT)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data.register()
    loaded = resolve(read([str(config), "--training.steps", "10"]))
    assert {problem.key for problem in [*loaded.problems, *examine(loaded.config, 1).problems]} <= FILES


@pytest.mark.skipif(not HAS_SMOLLM2, reason="make fetch-smollm2")
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
