"""A teacher of 216 MiB over two processes: no rank ever holds it, and every rank hears of damaged weights.

The test starts this file with torchrun; `_worker` is what each process runs.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

from let_plugin import host
from let_plugin.config import TeacherConfig
from let_plugin.errors import ConfigError
from let_plugin.teacher import quantization
from let_plugin.teacher.hf import HFTeacher, HFTeacherSource
from let_plugin.teacher.safetensors_files import read_headers
from tests.support import jobs

NUM_BLOCKS = 24
SPOILED = "layers.3.mlp.down_proj.weight"


def _build(path: str, processes: int, layer: int = NUM_BLOCKS - 1, **fields) -> HFTeacher:
    from torchtitan.distributed import ParallelDims

    from let_plugin.teacher.sharding import teacher_parallel_dims

    student = ParallelDims(dp_replicate=1, dp_shard=processes, cp=1, tp=1, pp=1, ep=1, world_size=processes)
    return HFTeacherSource(TeacherConfig(path=path, **fields)).build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=None,  # type: ignore[arg-type]
        parallel_dims=teacher_parallel_dims(student),
        layers=[layer],
        final_norm=True,
    )


def _measured_build(path: str, processes: int) -> tuple[HFTeacher, int]:
    """The teacher, and by how many bytes the peak of resident memory rose while it was made."""
    device_module = host.CpuDeviceModule()
    device_module.empty_cache()
    device_module.reset_peak_memory_stats()
    before = host.peak_resident_memory()
    teacher = _build(path, processes)
    return teacher, host.peak_resident_memory() - before


@torch.no_grad()
def _worker(path: str) -> None:
    from torch.distributed.tensor import DTensor

    host.set_up("cpu")
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    _build(path, 2, layer=0)  # what is made once
    sharded, sharded_rise = _measured_build(path, 2)
    tokens_BL = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(rank))
    states_BLE = sharded(tokens_BL, None)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())

    plain, plain_rise = _measured_build(path, 1)
    torch.testing.assert_close(states_BLE, plain(tokens_BL, None), rtol=0, atol=1e-5)
    full = sum(map(quantization.num_bytes, plain.parameters()))
    print(
        f"rank {rank}: {sharded_rise / 2**20:.0f} MiB sharded, {plain_rise / 2**20:.0f} plain, {full / 2**20:.0f} full"
    )
    assert plain_rise > 0.9 * full  # else nothing has been measured
    assert 0.4 * full < sharded_rise < 0.75 * full  # a half, and a few gathered blocks while it is tried out
    del sharded, plain

    small = _build(path, 2, layer=0, quantization="int8")  # whole on each rank
    assert not any(isinstance(parameter, DTensor) for parameter in small.parameters())
    cosine_BL = torch.nn.functional.cosine_similarity(
        small(tokens_BL, None), _build(path, 1, layer=0)(tokens_BL, None), dim=-1
    )
    assert 0.99 < cosine_BL.min() < 1 - 1e-7

    if rank == 0:  # spoils the last row, which is rank 1's
        tensor = read_headers(Path(path))[SPOILED]
        size = tensor.shape[0] * tensor.shape[1] * 4
        with open(tensor.file, "r+b") as f:
            os.pwrite(f.fileno(), b"\xff\xff\xff\x7f", tensor.offset + size - 4)
    torch.distributed.barrier()
    with pytest.raises(ConfigError, match=SPOILED):
        _build(path, 2, layer=3)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_no_rank_ever_holds_the_teacher(tmp_path) -> None:
    import transformers

    pytest.importorskip("torchao", reason="pip install torchao")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=384, num_hidden_layers=NUM_BLOCKS, num_attention_heads=6, intermediate_size=1536
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path, max_shard_size="100MB")
    # glibc keeps freed blocks of some MiB to itself, unless it is told to have each of them from the kernel.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = jobs.run("tests.integration.test_large_teacher", tmp_path, processes=2, OMP_NUM_THREADS="1", **malloc)
    print(result.stdout)


if __name__ == "__main__":
    _worker(sys.argv[1])
