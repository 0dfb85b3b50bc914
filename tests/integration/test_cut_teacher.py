"""A torchtitan teacher that is cut over 2 tensor-parallel ranks and sharded over 2 others: the same weights and states.

The test starts this file with torchrun; `_worker` is what each process runs. Shape legend: B batch, L sequence.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from let_plugin.config import TeacherConfig
from let_plugin.guidance.controls import randomise_weights
from let_plugin.runtime import host
from let_plugin.teacher.base import Teacher
from let_plugin.teacher.open import open_teacher
from tests.support import config_registry as _specs  # noqa: F401  (registers the demo's teacher)
from tests.support import jobs


def _build(**degrees: int) -> Teacher:
    """The demo's teacher for a student with these parallel degrees."""
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer

    from let_plugin.teacher.sharding import teacher_parallel_dims

    all_degrees = {name: degrees.get(name, 1) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")}
    student = ParallelDims(**all_degrees, world_size=4)
    source = open_teacher(TeacherConfig(spec="demo_teacher"))
    return source.build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=Trainer.Config(),
        parallel_dims=teacher_parallel_dims(student, tensor_parallel=True),
        layers=[0, source.info.num_layers - 1],
        final_norm=True,
    )


def _whole(teacher: Teacher) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in teacher.named_parameters()}


@torch.no_grad()
def _worker(out: str) -> None:
    host.set_up("cpu")
    torch.distributed.init_process_group("gloo")
    cut, plain = _build(tp=2, dp_shard=2), _build(dp_replicate=4)
    tokens_BL = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(0))
    share = max(p.to_local().numel() / p.numel() for p in cut.parameters() if p.ndim == 2)
    result: dict = {"share": share}
    for what in ("read", "drawn"):
        if what == "drawn":
            randomise_weights(cut)
            randomise_weights(plain)
        weights, expected = _whole(cut), _whole(plain)
        result[f"{what} weights"] = max((weights[name] - p).abs().max().item() for name, p in expected.items())
        difference = (cut(tokens_BL, None) - plain(tokens_BL, None)).abs().max().item()
        result[f"{what} states"] = difference
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_teacher_that_is_cut_and_sharded_is_the_whole_one(tmp_path) -> None:
    out = tmp_path / "result.json"
    jobs.run("tests.integration.test_cut_teacher", out, processes=4)
    result = json.loads(out.read_text())
    assert result["share"] == 1 / 4  # of every matrix
    assert result["read weights"] == 0
    assert result["drawn weights"] <= 1e-6
    assert max(result["read states"], result["drawn states"]) <= 1e-5


if __name__ == "__main__":
    _worker(sys.argv[1])
