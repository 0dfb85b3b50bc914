"""Runs the teacher over the data of a training run and writes its states; see export.py.

Shape legend: B batch, L sequence, E teacher width: the sum over the layers that are asked for.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from tqdm import tqdm

from let_plugin.preflight.export_plan import Plan
from let_plugin.runtime.batch_extras import BatchExtras, take_extras
from let_plugin.teacher.base import StateProvider
from let_plugin.teacher.open import make_provider, open_source
from let_plugin.teacher.sharding import SPMD_BACKEND, teacher_parallel_dims
from let_plugin.teacher.stored.encodings import Encoding, Moment, cosines, random_basis
from let_plugin.teacher.stored.features import PROJECTION, PROJECTIONS, Manifest, make_encoding, read_bases
from let_plugin.teacher.stored.shards import Shard, ShardWriter, row_keys, shard_paths, write_safely


def export(plan: Plan) -> Manifest:
    """Exports on all ranks of the process group, which is there already; returns the complete manifest."""

    rank, device, settings = dist.get_rank(), utils.get_local_device(), plan.settings
    if rank == 0:
        plan.folder.mkdir(parents=True, exist_ok=True)
        Manifest(settings=settings).write(plan.folder)
    own = ParallelDims(
        dp_replicate=1,
        dp_shard=plan.num_processes,
        cp=1,
        tp=1,
        pp=1,
        ep=1,
        world_size=plan.num_processes,
        spmd_backend=SPMD_BACKEND,
    )
    dims = teacher_parallel_dims(own)
    dims.build_mesh()
    source = open_source(plan.config.let.teacher)
    tokenizer = plan.config.tokenizer.build(tokenizer_path=plan.config.hf_assets_path)
    provider = make_provider(
        source,
        config=plan.config,
        student_tokenizer=tokenizer,
        device=device,
        parallel_dims=dims,
        layers=plan.layers,
    )
    if settings["encoding"]["name"] in PROJECTIONS:
        _fit(plan, provider, device)
    bases = read_bases(plan.folder) if settings["encoding"]["name"] in PROJECTIONS else {}
    bases = {layer: basis_EW.to(device) for layer, basis_EW in bases.items()}
    encodings = {layer: make_encoding(settings, layer, bases) for layer in plan.layers}

    tokens_per_batch = plan.batch_size * settings["seq_len"]
    progress = tqdm(
        total=plan.num_rows * settings["seq_len"],
        unit=" tokens",
        unit_scale=True,
        disable=rank != 0,
        desc="export",
        mininterval=1,
        smoothing=0.05,
    )
    started, num_run = time.perf_counter(), 0
    for first in range(0, settings["data_parallel_degree"], plan.num_processes):
        writer = ShardWriter(plan.folder, first + rank, settings["rows_per_shard"])
        for batch in _in_step(_batches(plan, provider, first + rank), device):
            keys = row_keys(batch)
            new = writer.new_rows(keys)
            # The teacher is sharded over the processes: it runs on all of them or on none.
            if _any(bool(new), device):
                states_BLE = _states(provider, batch, device)
                num_run += states_BLE.shape[0] * states_BLE.shape[1] * plan.num_processes
                for i, columns, cosines in _encode(states_BLE[new], encodings, settings["widths"]):
                    writer.add(keys[new[i]], columns, cosines)
            progress.update(tokens_per_batch * plan.num_processes)
        writer.finish()
    progress.close()
    dist.barrier()
    manifest = Manifest(settings=settings, result=_result(plan))
    if rank == 0:
        manifest.write(plan.folder)
        seconds = time.perf_counter() - started
        for line in _summary(manifest, num_run, seconds):
            logger.info(f"LET: {line}")
    dist.barrier()
    return manifest


def _batches(plan: Plan, provider: StateProvider, stream: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of one data-parallel rank of the run, on the CPU: "input", "positions", and the provider's extras."""

    config, settings = plan.config, plan.settings
    loader = config.dataloader.build(
        dp_world_size=settings["data_parallel_degree"],
        dp_rank=stream,
        tokenizer=config.tokenizer.build(tokenizer_path=config.hf_assets_path),
        seq_len=settings["seq_len"],
        local_batch_size=plan.batch_size,
        snapshot_every_n_steps=None,
    )
    if provider.make_extras is not None:
        BatchExtras(loader, provider.make_extras)
    for input_dict, _ in itertools.islice(loader, settings["rows_per_rank"] // plan.batch_size):
        extras = take_extras(input_dict)
        yield {name: input_dict[name] for name in ("input", "positions") if name in input_dict} | extras


def _in_step(batches: Iterator[dict[str, torch.Tensor]], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The batches until any process has none left: where the data end, the training run ends too."""
    while True:
        batch = next(batches, None)
        if _any(batch is None, device) or batch is None:
            return
        yield batch


def _any(value: bool, device: torch.device) -> bool:
    """Whether it is true on any process."""

    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _states(provider: StateProvider, batch: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """The states of a batch, on the device, [B, L, E]; zeros of tokens that have none."""

    with torch.no_grad():
        states = provider.states({name: tensor.to(device) for name, tensor in batch.items()})
        if states.known_BL is None:
            return states.states_BLE
        return states.states_BLE.masked_fill(~states.known_BL[..., None], 0)


def _encode(
    states_BLE: torch.Tensor, encodings: Mapping[int | str, Encoding], widths: Mapping[str, int]
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Of each row: its number, its columns, and by layer the cosines that say how well its tokens are stored."""

    if not len(states_BLE):
        return
    parts = states_BLE.split([widths[str(layer)] for layer in encodings], dim=-1)
    columns: dict[str, torch.Tensor] = {}
    fidelity: dict[str, list[torch.Tensor]] = {}
    for (layer, encoding), part_BLE in zip(encodings.items(), parts, strict=True):
        encoded = encoding.encode(part_BLE)
        decoded_BLE = encoding.decode(encoded, part_BLE.dtype)
        # Row by row: the rows of a batch may go to different files.
        fidelity[str(layer)] = [cosines(*pair).cpu() for pair in zip(part_BLE, decoded_BLE, strict=True)]
        columns |= {f"{layer}.{name}": tensor.cpu() for name, tensor in encoded.items()}
    for i in range(len(states_BLE)):
        yield i, {name: t[i].clone() for name, t in columns.items()}, {name: f[i] for name, f in fidelity.items()}


def _fit(plan: Plan, provider: StateProvider, device: torch.device) -> None:
    """Writes the projection, unless an earlier run has.

    PCA is fitted on the first rows of the first stream only: how many processes there are makes no difference.
    """

    path, encoding, widths = plan.folder / PROJECTION, plan.settings["encoding"], plan.settings["widths"]
    is_there = _any(path.exists(), device)
    if not is_there and encoding["name"] == "pca":
        moments = [Moment(width, device) for width in widths.values()]
        rank, num_batches = dist.get_rank(), -(-encoding["fit_rows"] // plan.batch_size)
        batches = itertools.islice(_batches(plan, provider, rank), num_batches)
        for batch in _in_step(batches, device):
            parts = _states(provider, batch, device).split(list(widths.values()), dim=-1)
            for moment, part_BLE in zip(moments, parts, strict=True):
                moment.add(part_BLE)
        bases = {} if rank else {layer: m.basis(encoding["width"]) for layer, m in zip(widths, moments, strict=True)}
    elif not is_there:
        bases = {layer: random_basis(width, encoding["width"], encoding["seed"]) for layer, width in widths.items()}
    if not is_there and dist.get_rank() == 0:
        write_safely(path, save(bases))
    dist.barrier()


def _result(plan: Plan) -> dict[str, Any]:
    """What all files together say of themselves."""

    shards = [Shard(path) for path in shard_paths(plan.folder)]
    fidelity = {}
    for layer in plan.settings["widths"]:
        parts = [shard.metadata["fidelity"][layer] for shard in shards]
        tokens = sum(part["tokens"] for part in parts)
        fidelity[layer] = {
            "tokens": tokens,
            "mean": sum(part["mean"] * part["tokens"] for part in parts) / max(1, tokens),
            # Of all tokens together, at most 1 in 100 is below it.
            "percentile_1": min((part["percentile_1"] for part in parts), default=1.0),
        }
    return {"num_shards": len(shards), "num_rows": sum(shard.num_rows for shard in shards), "fidelity": fidelity}


def _summary(manifest: Manifest, num_run: int, seconds: float) -> list[str]:
    result = manifest.result
    assert result is not None
    lines = [f"export: {result['num_rows']:,} different rows in {result['num_shards']} files"]
    if num_run:
        lines.append(
            f"export: {num_run:,} tokens through the teacher in {seconds:.0f} s, {num_run / seconds:,.0f} per s"
        )
    for layer, cosine in result["fidelity"].items():
        lines.append(
            f"export: layer {layer}: cosine of what is stored with the teacher's own {cosine['mean']:.5f} on average, "
            f"{cosine['percentile_1']:.5f} at the first percentile"
        )
    return lines
