"""Runs the teacher over the data of a training run and writes its states; export_plan.py says which.

Each data-parallel rank of the run to come has a stream of rows of its own; the processes of the export share them.

Shape legend: B batch, L sequence, E teacher width: the sum over the layers that are asked for.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from tqdm import tqdm

from let_plugin.preflight.export_plan import Plan
from let_plugin.runtime.batch_extras import BatchExtras, take_extras
from let_plugin.teacher.base import StateProvider
from let_plugin.teacher.open import make_provider, open_source
from let_plugin.teacher.sharding import SPMD_BACKEND
from let_plugin.teacher.stored.features import Manifest
from let_plugin.teacher.stored.shards import Shard, ShardWriter, encode, row_keys, shard_paths

SHARD_BYTES = 2**26  # what an interruption loses at most, of each process


def export(plan: Plan) -> Manifest:
    """Exports on all ranks of the process group, which is there already; returns the complete manifest."""
    rank, settings, config = dist.get_rank(), plan.settings, plan.config
    if rank == 0:
        plan.folder.mkdir(parents=True, exist_ok=True)
        Manifest(settings=settings).write(plan.folder)
    degrees = {"dp_replicate": 1, "dp_shard": dist.get_world_size(), "cp": 1, "tp": 1, "pp": 1, "ep": 1}
    dims = ParallelDims(**degrees, world_size=dist.get_world_size(), spmd_backend=SPMD_BACKEND)
    dims.build_mesh()
    source, tokenizer = open_source(config.let.teacher), config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    # The teacher is sharded over the processes of the export.
    device, layers = utils.get_local_device(), settings["layers"]
    provider = make_provider(source, config, device, dims, layers, student_tokenizer=tokenizer)
    bar: dict[str, Any] = {"desc": "export", "unit": " tokens", "unit_scale": True, "mininterval": 1}
    progress = tqdm(total=plan.num_rows * settings["seq_len"], disable=rank != 0, **bar)
    for first in range(0, settings["data_parallel_degree"], dist.get_world_size()):
        _export_stream(plan, provider, first + rank, progress)
    progress.close()
    dist.barrier()
    shards = [Shard(path) for path in shard_paths(plan.folder)]
    result = {"num_shards": len(shards), "num_rows": sum(len(shard.keys) for shard in shards)}
    manifest = Manifest(settings=settings, result=result)
    if rank == 0:
        manifest.write(plan.folder)
        logger.info(f"LET: export: {result['num_rows']:,} different rows in {len(shards)} files")
    dist.barrier()
    return manifest


@torch.no_grad()
def _export_stream(plan: Plan, provider: StateProvider, stream: int, progress: Any) -> None:
    """Writes the rows of one data-parallel rank of the run."""
    settings, device = plan.settings, utils.get_local_device()
    writer = ShardWriter(plan.folder, stream, max(1, SHARD_BYTES // plan.bytes_per_row))
    batches = _batches(plan, provider, stream)
    # Where the data end on any process, the training run ends too.
    while not _any((batch := next(batches, None)) is None, device):
        assert batch is not None
        keys = row_keys(batch)
        new = writer.new_rows(keys)
        # The teacher is sharded over the processes: it runs on all of them or on none.
        if _any(bool(new), device):
            states_BLE, known_BL, _ = provider.states({name: tensor.to(device) for name, tensor in batch.items()})
            if known_BL is not None:
                states_BLE = states_BLE.masked_fill(~known_BL[..., None], 0)
            for i in new:
                writer.add(keys[i], _encode(states_BLE[i], settings))
        progress.update(settings["batch_size"] * settings["seq_len"] * dist.get_world_size())
    writer.finish()


def _batches(plan: Plan, provider: StateProvider, stream: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of one data-parallel rank of the run, on the CPU: "input", "positions", and the provider's extras."""
    config, settings = plan.config, plan.settings
    loader = config.dataloader.build(
        dp_world_size=settings["data_parallel_degree"],
        dp_rank=stream,
        tokenizer=config.tokenizer.build(tokenizer_path=config.hf_assets_path),
        seq_len=settings["seq_len"],
        local_batch_size=settings["batch_size"],
        snapshot_every_n_steps=None,
    )
    if provider.make_extras is not None:
        BatchExtras(loader, provider.make_extras)
    for input_dict, _ in itertools.islice(loader, settings["rows_per_rank"] // settings["batch_size"]):
        extras = take_extras(input_dict)
        yield {name: input_dict[name] for name in ("input", "positions") if name in input_dict} | extras


def _any(value: bool, device: torch.device) -> bool:
    """Whether it is true on any process."""
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _encode(states_LE: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A row's columns."""
    parts = zip(settings["widths"], states_LE.split(list(settings["widths"].values()), dim=-1), strict=True)
    encoded = {layer: encode(part_LE, settings["encoding"]) for layer, part_LE in parts}
    return {f"{layer}.{name}": t.cpu() for layer, columns in encoded.items() for name, t in columns.items()}
