"""Teachers of 216 MiB over two processes: no rank ever holds one, and every rank hears of damaged weights.

The tests start this file with torchrun; `_worker` is what each process runs.
"""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.runtime import host
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher import quantization
from let_plugin.teacher.base import Teacher
from let_plugin.teacher.hf.safetensors_files import read_headers
from let_plugin.teacher.open import open_teacher
from let_plugin.teacher.titan.source import register_teacher_spec
from tests.support import gguf_files, jobs

NUM_BLOCKS = 24
WIDTH, HIDDEN, VOCAB_SIZE = 384, 1536, 64
SPEC = "of_216_mib"
SPOILED = "layers.3.mlp.down_proj.weight"


def _build(options: dict, shards: int, layer: int = NUM_BLOCKS - 1, **fields) -> Teacher:
    """The teacher of a `[let.teacher]` table, in two shards (or cut in two) or whole in each of the two processes."""
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer

    from let_plugin.teacher.sharding import teacher_parallel_dims

    cut = shards == 2 and options.get("tensor_parallel", False)
    degrees = {"dp_shard": 1, "tp": 2} if cut else {"dp_shard": shards, "tp": 1}
    student = ParallelDims(dp_replicate=2 // shards, **degrees, cp=1, pp=1, ep=1, world_size=2)
    return open_teacher(TeacherConfig(**options, **fields)).build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=Trainer.Config(),
        parallel_dims=teacher_parallel_dims(student, tensor_parallel=cut),
        layers=[layer],
        final_norm=True,
    )


def _measured_build(options: dict, shards: int, **fields) -> tuple[Teacher, int]:
    """The teacher, and by how many bytes the peak of resident memory rose while it was made."""
    gc.collect()  # FSDP2's modules are in cycles: an earlier teacher is to be gone before this one is measured
    device_module = host.CpuDeviceModule()
    device_module.empty_cache()
    device_module.reset_peak_memory_stats()
    before = host.peak_resident_memory()
    teacher = _build(options, shards, **fields)
    return teacher, host.peak_resident_memory() - before


def _spec():
    return llama_spec(
        SPEC, dim=WIDTH, num_layers=NUM_BLOCKS, num_heads=6, hidden_dim=HIDDEN, vocab_size=VOCAB_SIZE, norm_eps=1e-6
    )


def _write(kind: str, folder: Path) -> dict:
    """Writes the weights; returns the `[let.teacher]` table for them."""
    import transformers

    if kind == "gguf":
        size = {"num_blocks": NUM_BLOCKS, "width": WIDTH, "hidden": HIDDEN, "vocab_size": VOCAB_SIZE}
        return {"path": gguf_files.write_llama(folder / "teacher.gguf", **size, quantization="Q4_0")}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=6,
        intermediate_size=HIDDEN,
    )
    if kind in ("transformers", "int8"):
        transformers.AutoModel.from_config(config).save_pretrained(folder, max_shard_size="100MB")
        return {"path": str(folder)} | ({"quantization": "int8"} if kind == "int8" else {})
    model = transformers.AutoModelForCausalLM.from_config(config)
    if kind.startswith("native"):
        model.save_pretrained(folder, max_shard_size="100MB")
    else:
        assert kind.startswith("DCP")
        spec = _spec()
        weights = spec.state_dict_adapter(spec.model, None).from_hf(model.state_dict())
        dcp.save(weights, checkpoint_id=str(folder), no_dist=True)
    return {"path": str(folder), "spec": SPEC} | ({"tensor_parallel": True} if kind.endswith("cut") else {})


def _worker(options: dict) -> None:
    host.set_up("cpu")
    register_teacher_spec(SPEC, _spec)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    _build(options, 2, layer=0)  # what is made once
    # The ranks among which a teacher is cut see the same rows.
    seed = 0 if options.get("tensor_parallel") else rank
    tokens_BL = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        if "quantization" in options:
            _measure_int8(options, rank)
            _compare_int8(options, tokens_BL)
        else:
            _measure_shards(options, tokens_BL, rank)
            if "spec" not in options and os.path.isdir(options["path"]):
                _spoil(options, rank)
    torch.distributed.destroy_process_group()


def _measure_shards(options: dict, tokens_BL: torch.Tensor, rank: int) -> None:
    from torch.distributed.tensor import DTensor

    sharded, sharded_rise = _measured_build(options, 2)
    states_BLE = sharded(tokens_BL, None)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())

    plain, plain_rise = _measured_build(options, 1)
    torch.testing.assert_close(states_BLE, plain(tokens_BL, None), rtol=0, atol=1e-5)
    full = sum(map(quantization.num_bytes, plain.parameters()))
    print(
        f"rank {rank}: {sharded_rise / 2**20:.0f} MiB sharded, {plain_rise / 2**20:.0f} plain, {full / 2**20:.0f} full"
    )
    assert plain_rise > 0.9 * full  # else nothing has been measured
    # A half, and a few gathered blocks while it is tried out. A .gguf file is mapped, and its pages count as well.
    mapped = os.path.getsize(options["path"]) if os.path.isfile(options["path"]) else 0
    bound = 0.75 * full + mapped
    assert 0.4 * full < sharded_rise < bound < full


def _measure_int8(options: dict, rank: int) -> None:
    teacher, rise = _measured_build(options, 2)
    full = 4 * sum(parameter.numel() for parameter in teacher.parameters())
    print(f"rank {rank}: {rise / 2**20:.0f} MiB as int8, whole, {full / 2**20:.0f} full")
    assert 0.2 * full < rise < 0.35 * full  # a quarter, and the matrix that is being quantised


def _compare_int8(options: dict, tokens_BL: torch.Tensor) -> None:
    from torch.distributed.tensor import DTensor

    small = _build(options, 2, layer=0)  # whole on each rank
    assert not any(isinstance(parameter, DTensor) for parameter in small.parameters())
    plain = _build(options | {"quantization": "none"}, 1, layer=0)
    cosine_BL = torch.nn.functional.cosine_similarity(small(tokens_BL, None), plain(tokens_BL, None), dim=-1)
    assert 0.99 < cosine_BL.min() < 1 - 1e-7


def _spoil(options: dict, rank: int) -> None:
    if rank == 0:  # spoils the last row, which is rank 1's
        tensor = read_headers(Path(options["path"]))[SPOILED]
        size = tensor.shape[0] * tensor.shape[1] * 4
        with open(tensor.file, "r+b") as f:
            os.pwrite(f.fileno(), b"\xff\xff\xff\x7f", tensor.offset + size - 4)
    torch.distributed.barrier()
    with pytest.raises(ConfigError, match=SPOILED):
        _build(options, 2, layer=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "native", "native, cut", "DCP", "DCP, cut", "gguf", "int8"])
def test_no_rank_ever_holds_the_teacher(tmp_path, kind) -> None:
    if kind == "int8":
        pytest.importorskip("torchao", reason="pip install torchao")
    if kind == "gguf":
        pytest.importorskip("gguf", reason="pip install let-plugin[hf]")
    options = json.dumps(_write(kind, tmp_path))
    # glibc keeps freed blocks of some MiB to itself, unless it is told to have each of them from the kernel.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = jobs.run("tests.integration.test_large_teacher", options, processes=2, OMP_NUM_THREADS="1", **malloc)
    print(result.stdout)


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
