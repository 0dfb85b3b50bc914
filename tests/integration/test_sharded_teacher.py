"""Teachers over several processes (gloo): the states of one process, sharded weights, refusals that every rank hears.

The tests start this file; `_worker` is what each process runs. Shape legend: B batch, L sequence.
"""

import gc
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.runtime import host
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.base import Teacher
from let_plugin.teacher.open import open_teacher
from let_plugin.teacher.sharding import teacher_parallel_dims
from let_plugin.teacher.titan.source import register_teacher_spec
from let_plugin.trainer import with_let
from tests.support import hf_models, jobs
from tests.support.gguf_files import write_llama

pytestmark = pytest.mark.slow

COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Name of a folder with weights, the student's parallel degrees, layers, and shards of each weight.
ON_TWO = [
    ("llama", {"dp_shard": 2}, [1], 2),
    ("opt", {"dp_shard": 2}, [0], 2),
    ("opt", {"tp": 2}, [1], 2),  # over the ranks of a pipeline stage, whatever they do for the student
    ("gpt2", {"dp_replicate": 2}, [1, "embedding"], 1),
    ("tiny.gguf", {"dp_shard": 2}, [0], 2),
]
ON_FOUR = [(name, {"pp": 2, "dp_shard": 2}, ["embedding", 1, 0], 2) for name in ("llama", "opt")]

LARGE = "of_216_mib"


def _large_spec():
    size = {"dim": 384, "num_layers": 24, "num_heads": 6, "hidden_dim": 1536, "vocab_size": 64}
    return llama_spec(LARGE, **size, norm_eps=1e-6)


def _batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_BL and positions_BL of a data-parallel rank: packed documents, other ones on each rank."""
    tokens_BL = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(rank))
    boundary = 5 + rank
    positions_L = torch.cat([torch.arange(boundary), torch.arange(16 - boundary)])
    return tokens_BL, positions_L.repeat(2, 1)


def _build(options: dict, degrees: dict[str, int], layers: list[int | str]) -> Teacher:
    """The teacher of a `[let.teacher]` table, for a student with these parallel degrees."""
    all_degrees = {name: degrees.get(name, 1) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")}
    student = ParallelDims(**all_degrees, world_size=math.prod(all_degrees.values()))
    teacher_dims = teacher_parallel_dims(student)
    if student.world_size > 1:
        teacher_dims.build_mesh()
    config = with_let(Trainer.Config())
    config.let.teacher = TeacherConfig(**options, dtype="float32")
    return open_teacher(config.let.teacher).build(config, torch.device("cpu"), teacher_dims, layers)


def _worker(what: str, folder: str) -> None:
    host.set_up("cpu")
    torch.distributed.init_process_group("gloo")
    with torch.no_grad():
        _measure(Path(folder)) if what == "memory" else _write_states(Path(folder))
    torch.distributed.destroy_process_group()


def _write_states(folder: Path) -> None:
    rank, two = torch.distributed.get_rank(), torch.distributed.get_world_size() == 2
    for i, (name, degrees, layers, shards) in enumerate(ON_TWO if two else ON_FOUR):
        rng_state = torch.get_rng_state()
        teacher = _build({"path": str(folder / name)}, degrees, layers)
        assert torch.equal(rng_state, torch.get_rng_state())
        first, again = teacher(*_batch(rank)), teacher(*_batch(rank))
        torch.testing.assert_close(first, again, rtol=0, atol=1e-6)
        assert type(first) is torch.Tensor
        _check_shards(teacher, shards)  # after a forward: the root is not left gathered either
        torch.save(first, folder / f"{torch.distributed.get_world_size()}-{i}-{rank}.pt")
    if two:
        with pytest.raises(ConfigError, match="NaN"):  # the rank that has not read hears of it
            _build({"path": str(folder / "spoiled")}, {"dp_shard": 2}, [1])


def _check_shards(teacher: Teacher, shards: int) -> None:
    from torch.distributed.tensor import DTensor

    for parameter in teacher.parameters():
        assert not parameter.requires_grad
        assert isinstance(parameter, DTensor) == (shards > 1)
        if isinstance(parameter, DTensor):
            assert parameter.device_mesh.size() == shards
            assert parameter.to_local().numel() < parameter.numel()


def _measure(folder: Path) -> None:
    """By how much the peak of resident memory rises while a teacher is made: by less than all of it."""
    register_teacher_spec(LARGE, _large_spec)
    device_module = host.CpuDeviceModule()
    for kind in ("safetensors", "DCP"):
        options = {"path": str(folder / kind), "spec": LARGE}
        _build(options, {"dp_shard": 2}, [0])  # what is made once
        gc.collect()  # FSDP2's modules are in cycles: an earlier teacher is to be gone before this one is measured
        device_module.empty_cache()
        device_module.reset_peak_memory_stats()
        before = host.peak_resident_memory()
        teacher = _build(options, {"dp_shard": 2}, [23])
        rise = host.peak_resident_memory() - before
        full = sum(4 * parameter.numel() for parameter in teacher.parameters())
        assert full > 200 * 2**20
        # A safetensors file is mapped, and its pages count as well.
        mapped = sum(file.stat().st_size for file in (folder / kind).glob("*.safetensors"))
        assert 0.4 * full < rise < 0.9 * full + mapped, f"{kind}: {rise / 2**20:.0f} of {full / 2**20:.0f} MiB"
        del teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With small models that `transformers` has saved, one of them with a weight that is not a number."""
    import transformers

    folder = tmp_path_factory.mktemp("teachers")
    configs = {
        "llama": transformers.LlamaConfig(**COMMON, intermediate_size=48),
        "opt": transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
        "gpt2": transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }
    for name, config in configs.items():
        hf_models.save(folder / name, config)
    weight = "model.decoder.layers.1.fc2.weight"
    shutil.copytree(folder / "opt", folder / "spoiled")
    hf_models.weights(lambda tensors: tensors | {weight: tensors[weight] * math.nan})(folder / "spoiled")
    write_llama(folder / "tiny.gguf")
    return folder


@pytest.mark.parametrize(("processes", "cases"), [(2, ON_TWO), (4, ON_FOUR)])
def test_states_equal_those_of_one_process_and_damage_is_an_error_on_every_rank(folder, processes, cases) -> None:
    jobs.run("tests.integration.test_sharded_teacher", "states", folder, processes=processes)
    for i, (name, _, layers, _) in enumerate(cases):
        teacher = _build({"path": str(folder / name)}, {}, layers)
        for rank in range(processes):
            with torch.no_grad():
                expected = teacher(*_batch(rank))
            states = torch.load(folder / f"{processes}-{i}-{rank}.pt")
            torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


def test_no_rank_ever_holds_a_teacher_of_torchtitan(tmp_path) -> None:
    spec = _large_spec()
    host.adapt_model_spec(spec)
    weights = {name: torch.randn(p.shape) * 0.02 for name, p in spec.model.build().state_dict().items()}
    dcp.save(weights, checkpoint_id=str(tmp_path / "DCP"), no_dist=True)
    (tmp_path / "safetensors").mkdir()
    hf = spec.state_dict_adapter(spec.model, None).to_hf(weights)
    save_file({name: p.contiguous() for name, p in hf.items()}, tmp_path / "safetensors/model.safetensors")
    # glibc keeps freed blocks of some MiB to itself, unless it is told to have each of them from the kernel.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    jobs.run("tests.integration.test_sharded_teacher", "memory", tmp_path, processes=2, **malloc)


if __name__ == "__main__":
    _worker(sys.argv[1], sys.argv[2])
