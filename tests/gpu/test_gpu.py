"""What only an accelerator can show: `pytest -m gpu` on a machine that has one. All of it is one job there."""

import pytest
import torch

from let_plugin.demo import TEACHER
from tests.support import jobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")]

COMPILED = ["--compile.enable", "--training.mixed_precision_param", "bfloat16", "--training.steps", "8"]
GRAPHS = ["--training.no-disable-cuda-graphs", "--training.steps", "10", "--let.stop-step", "5"]
MATCHES = ("interpolate", "linear")
EAGER = {
    "states": [],
    "rows": ["--let.teacher.rows", "0.5"],
    "logits": ["--let.signal", "logits"],
    "labels": ["--let.signal", "labels"],
    "least squares": ["--let.dimension-match", "least_squares"],
    "transformers": ["--let.teacher.spec", "transformers", "--let.teacher.path", TEACHER],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, headed_teacher):
    """Name -> what the run did."""
    folder = tmp_path_factory.mktemp("gpu")
    config = jobs.tiny(folder, headed_teacher[0])
    start = jobs.seed_checkpoint(folder / "seed", config)
    cases = {"compiled": COMPILED} | {f"gpu, {name}": [*start, *own] for name, own in EAGER.items()}
    for match in MATCHES:
        for captured in ("cuda-graphs", "no-cuda-graphs"):
            cases[f"{match}, {captured}"] = [*GRAPHS, "--let.dimension-match", match, f"--let.{captured}"]
    cases = {name: (config, args) for name, args in cases.items()}
    (folder / "cpu").mkdir()
    eager = {f"cpu, {name}": (config, [*start, *own]) for name, own in EAGER.items()}
    on_cpu = jobs.train_many(folder / "cpu", eager, 1)
    return on_cpu | jobs.train_many(folder, cases, 1, PROBE_DEVICE="auto")


@pytest.mark.parametrize("name", EAGER)
def test_the_gradient_equals_that_of_the_cpu(runs, name):
    cpu, gpu = (runs[f"{device}, {name}"]["gradients"] for device in ("cpu", "gpu"))
    assert jobs.relative_difference(gpu, cpu) <= 1e-4


def test_compiled_training_in_bfloat16_ends_the_alignment(runs):
    assert [line["let/active"] for line in runs["compiled"]["logged"]] == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("match", MATCHES)
def test_cuda_graphs_change_nothing_and_are_captured_again_after_the_stop(runs, match):
    captured, plain = (runs[f"{match}, {which}"] for which in ("cuda-graphs", "no-cuda-graphs"))
    assert captured["messages"].count("Recorded CUDA graph") == 2  # with the tap, and without
    assert plain["messages"].count("Recorded CUDA graph") == 1  # after the stop
    for got, expected in zip(captured["logged"], plain["logged"], strict=True):
        for name in ("loss", "grad_norm", "let/lambda", "let/cosine"):
            assert got.get(name) == pytest.approx(expected.get(name), rel=1e-4)
