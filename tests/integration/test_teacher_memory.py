"""Teachers that take less memory guide real runs as the plain one does: offloaded to the CPU, and in 8 bits."""

from importlib.util import find_spec

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

KINDS = {"plain": "", "offloaded": "teacher.cpu_offload = true\n"}
if find_spec("torchao") is not None:
    KINDS["int8"] = 'teacher.quantization = "int8"\n'
LAYOUTS = {1: [], 2: ["--parallelism.data_parallel_shard_degree", 2, "--training.local_batch_size", 2]}


@pytest.fixture(scope="module", params=LAYOUTS, ids=["one process", "FSDP2"])
def runs(request, tmp_path_factory, tiny_teacher):
    """Name -> what the run did."""
    folder = tmp_path_factory.mktemp("memory")
    args = [*LAYOUTS[request.param], "--training.steps", 3, "--let.stop-step", 2]
    cases = {}
    for name, line in KINDS.items():
        config = folder / f"{name}.toml"
        config.write_text(jobs.TINY.format(folder=folder / name, teacher=tiny_teacher[0]) + line)
        cases[name] = (config, args)
    runs = jobs.train_many(folder, cases, processes=request.param)
    for run in runs.values():
        assert "error" not in run, run["error"]
        assert [step["let/active"] for step in run["logged"]] == [1, 1, 0]
        assert run["watched"][0] and not any(run["leftovers"])
    return runs


def test_an_offloaded_teacher_changes_nothing(runs):
    run, plain = runs["offloaded"], runs["plain"]
    assert jobs.relative_difference(run["gradients"], plain["gradients"]) == 0
    for got, expected in zip(run["logged"], plain["logged"], strict=True):
        assert got["loss"] == expected["loss"] and got.get("let/cosine") == expected.get("let/cosine")


@pytest.mark.skipif("int8" not in KINDS, reason="pip install torchao")
def test_a_teacher_in_8_bits_changes_little(runs):
    run, plain = runs["int8"], runs["plain"]
    assert 0 < jobs.relative_difference(run["gradients"], plain["gradients"]) < 1e-2
    for got, expected in zip(run["logged"], plain["logged"], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-3)
        assert got.get("let/cosine") == pytest.approx(expected.get("let/cosine"), abs=3e-3)
