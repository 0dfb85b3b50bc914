"""LET knows no model: other decoders of torchtitan, of debug size, under FSDP2."""

import pytest

from tests.support import jobs


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny_qwen3", "tiny_mixture_of_experts"])
def test_it_trains_with_let(tmp_path, tiny_config, base):
    tiny_config.write_text(tiny_config.read_text().replace("tests.support.tiny", f"tests.support.{base}"))
    args = ["--training.local-batch-size", "2", "--training.steps", "3", "--let.stop-step", "2"]
    jobs.run("let_plugin.train", tiny_config, *args, processes=2, OMP_NUM_THREADS="1")
    lines = jobs.metrics(tmp_path / "out")
    assert [line["let/active"] for line in lines] == [1.0, 1.0, 0.0]
    assert all(-1 <= line["let/cosine"] <= 1 and line["let/cosine"] != 0 for line in lines[:2])
