"""What only an accelerator can show: `pytest -m gpu` on a machine that has one."""

import pytest
import torch

from tests.support import jobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]

ON_GPU = ["--runtime.device", "auto"]


def test_the_gradient_equals_that_of_the_cpu(tmp_path, tiny_config):
    start = jobs.seed_checkpoint(tmp_path / "seed", tiny_config)
    cpu = jobs.probe(tmp_path / "cpu", tiny_config, *start)
    gpu = jobs.probe(tmp_path / "gpu", tiny_config, *start, *ON_GPU, PROBE_DEVICE="auto")
    assert jobs.relative_difference(gpu["gradients"][0], cpu["gradients"][0]) <= 1e-4


def test_compiled_training_in_bfloat16_ends_the_alignment(tmp_path, tiny_config):
    args = ["--compile.enable", "--training.mixed_precision_param", "bfloat16", "--training.steps", "8"]
    jobs.probe(tmp_path / "gpu", tiny_config, *args, *ON_GPU, PROBE_DEVICE="auto")
    lines = jobs.metrics(tmp_path / "gpu")
    assert [line["let/active"] for line in lines] == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("match", ["interpolate", "linear"])
def test_cuda_graphs_change_nothing_and_are_captured_again_after_the_stop(tmp_path, tiny_config, match):
    args = ["--training.no-disable-cuda-graphs", "--training.steps", "10", "--let.stop-step", "5"]
    args += ["--let.dimension-match", match, *ON_GPU]
    logged = {}
    for captured in ("no-cuda-graphs", "cuda-graphs"):
        folder = tmp_path / captured
        result = jobs.run("let_plugin.train", tiny_config, *args, f"--let.{captured}", "--dump_folder", folder)
        num_captures = 2 if captured == "cuda-graphs" else 0  # with the tap, and without
        assert (result.stdout + result.stderr).count("Recorded CUDA graph") == num_captures
        logged[captured] = jobs.metrics(folder)
    for got, expected in zip(logged["cuda-graphs"], logged["no-cuda-graphs"], strict=True):
        for name in ("loss_metrics/global_avg_loss", "grad_norm", "let/lambda", "let/cosine"):
            assert got.get(name) == pytest.approx(expected.get(name), rel=1e-4)
