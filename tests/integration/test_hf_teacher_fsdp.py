"""HFTeacher over several processes (gloo): the states of one process, and weights that are sharded between forwards.

The test starts this file with torchrun; `_worker` is what each process runs. Shape legend: B batch, L sequence.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

from let_plugin import host
from let_plugin.config import TeacherConfig
from let_plugin.teacher.hf import HFTeacher, HFTeacherSource

ROOT = Path(__file__).resolve().parents[2]


def _batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_BL and positions_BL of a data-parallel rank: packed documents, other ones on each rank."""
    tokens_BL = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(rank))
    boundary = 5 + rank
    positions_L = torch.cat([torch.arange(boundary), torch.arange(16 - boundary)])
    return tokens_BL, positions_L.repeat(2, 1)


def _build(path: str, spmd_backend: str, replicate: int, shard: int) -> HFTeacher:
    from torchtitan.distributed import ParallelDims

    world_size = replicate * shard
    parallel_dims = ParallelDims(
        dp_replicate=replicate,
        dp_shard=shard,
        cp=1,
        tp=1,
        pp=1,
        ep=1,
        world_size=world_size,
        spmd_backend=spmd_backend,  # type: ignore[arg-type]
    )
    if world_size > 1:
        parallel_dims.build_mesh()
    source = HFTeacherSource(TeacherConfig(path=path))
    return source.build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=None,  # type: ignore[arg-type]
        parallel_dims=parallel_dims,
    )


def _worker(path: str, out: str, spmd_backend: str, replicate: int, shard: int) -> None:
    from torch.distributed.tensor import DTensor

    host.set_up("cpu")
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    rng_state = torch.get_rng_state()
    teacher = _build(path, spmd_backend, replicate, shard)
    assert torch.equal(rng_state, torch.get_rng_state())
    with torch.no_grad():
        first = teacher(*_batch(rank))
        again = teacher(*_batch(rank))
    assert torch.equal(first, again)
    assert type(first) is torch.Tensor
    for parameter in teacher.parameters():  # after a forward: the root is not left gathered either
        assert not parameter.requires_grad
        assert isinstance(parameter, DTensor) == (shard > 1)
        if isinstance(parameter, DTensor):
            assert parameter.device_mesh.size() == shard
            assert parameter.to_local().numel() < parameter.numel()
    torch.save(first, Path(out) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "spmd_backend", "replicate", "shard"),
    [
        ("llama", "spmd_types", 1, 2),
        ("opt", "partial_dtensor", 1, 2),
        ("gpt2", "spmd_types", 2, 1),
        ("llama", "full_dtensor", 2, 2),
    ],
)
def test_states_equal_those_of_one_process(tmp_path, family, spmd_backend, replicate, shard) -> None:
    import transformers

    common = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(**common, intermediate_size=48),
        "opt": lambda: transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }[family]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(replicate * shard)]
    command += ["--master-port", str(port), __file__, str(tmp_path), str(tmp_path), spmd_backend]
    subprocess.run(
        [*command, str(replicate), str(shard)],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )

    host.set_up("cpu")
    teacher = _build(str(tmp_path), spmd_backend, 1, 1)
    for rank in range(replicate * shard):
        with torch.no_grad():
            expected = teacher(*_batch(rank))
        states = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


if __name__ == "__main__":
    _worker(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
