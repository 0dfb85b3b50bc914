"""HFTeacher over several processes (gloo): the states of one process, and weights that are sharded between forwards.

The test starts this file with torchrun; `_worker` is what each process runs. Shape legend: B batch, L sequence.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

from let_plugin.alignment.layer_mapping import EMBEDDING
from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.runtime import host
from let_plugin.teacher.hf.source import HFTeacher, HFTeacherSource
from tests.support import jobs


def _batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_BL and positions_BL of a data-parallel rank: packed documents, other ones on each rank."""
    tokens_BL = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(rank))
    boundary = 5 + rank
    positions_L = torch.cat([torch.arange(boundary), torch.arange(16 - boundary)])
    return tokens_BL, positions_L.repeat(2, 1)


def _build(path: str, degrees: dict[str, int], layers: list[int | str]) -> HFTeacher:
    """The teacher of a student with these parallel degrees."""
    from torchtitan.distributed import ParallelDims

    from let_plugin.teacher.sharding import teacher_parallel_dims

    all_degrees = {name: degrees.get(name, 1) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")}
    student = ParallelDims(**all_degrees, world_size=math.prod(all_degrees.values()))
    teacher_dims = teacher_parallel_dims(student)
    if student.world_size > 1:
        teacher_dims.build_mesh()
    return HFTeacherSource(TeacherConfig(path=path)).build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=None,  # type: ignore[arg-type]
        parallel_dims=teacher_dims,
        layers=layers,
        final_norm=True,
    )


def _spoil(path: str, rank: int) -> None:
    from safetensors.torch import load_file, save_file

    if rank == 0:
        weights = load_file(Path(path, "model.safetensors"))
        weights["model.embed_tokens.weight"][-1] = torch.nan
        save_file(weights, Path(path, "spoiled.safetensors"), metadata={"format": "pt"})
        Path(path, "model.safetensors").rename(Path(path, "whole.safetensors"))
        Path(path, "spoiled.safetensors").rename(Path(path, "model.safetensors"))
    torch.distributed.barrier()


def _worker(path: str, out: str, degrees: dict[str, int], layers: list[int | str], shards: int) -> None:
    from torch.distributed.tensor import DTensor

    host.set_up("cpu")
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    rng_state = torch.get_rng_state()
    teacher = _build(path, degrees, layers)
    assert torch.equal(rng_state, torch.get_rng_state())
    with torch.no_grad():
        first = teacher(*_batch(rank))
        again = teacher(*_batch(rank))
    torch.testing.assert_close(first, again, rtol=0, atol=1e-6)
    assert type(first) is torch.Tensor
    for parameter in teacher.parameters():  # after a forward: the root is not left gathered either
        assert not parameter.requires_grad
        assert isinstance(parameter, DTensor) == (shards > 1)
        if isinstance(parameter, DTensor):
            assert parameter.device_mesh.size() == shards
            assert parameter.to_local().numel() < parameter.numel()
    if degrees == {"dp_shard": 2}:
        _spoil(path, rank)
        with pytest.raises(ConfigError, match="NaN"):  # the rank that has not read hears of it
            _build(path, degrees, layers)
    torch.save(first, Path(out) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "degrees", "layers", "shards"),
    [
        ("llama", {"dp_shard": 2}, [1], 2),
        ("llama", {"dp_shard": 2}, [0], 2),
        ("opt", {"tp": 2}, [1], 2),  # over the ranks of a pipeline stage, whatever they do for the student
        ("gpt2", {"dp_replicate": 2}, [1, EMBEDDING], 1),
        ("llama", {"pp": 2, "dp_shard": 2}, [EMBEDDING, 1, 0], 2),
    ],
)
def test_states_equal_those_of_one_process(tmp_path, family, degrees, layers, shards) -> None:
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

    processes = math.prod(degrees.values())
    module = "tests.integration.test_hf_teacher_fsdp"
    arguments = (tmp_path, tmp_path, json.dumps(degrees), json.dumps(layers), shards)
    jobs.run(module, *arguments, processes=processes, OMP_NUM_THREADS="1")

    host.set_up("cpu")
    if Path(tmp_path, "whole.safetensors").exists():
        Path(tmp_path, "whole.safetensors").rename(tmp_path / "model.safetensors")
    teacher = _build(str(tmp_path), {}, layers)
    for rank in range(processes):
        with torch.no_grad():
            expected = teacher(*_batch(rank))
        states = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


if __name__ == "__main__":
    _worker(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5]))
