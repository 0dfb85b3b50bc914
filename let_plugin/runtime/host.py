"""Prepares the process: its rank in the job, and execution on the CPU.

torchtitan 0.3.0 assumes an accelerator. This is the only module that patches it, and only without one. On the CPU:

* torchtitan gets a device module whose memory statistics are those of the process's resident memory;
* FSDP2 reduces with a plain sum, because gloo has no PREMUL_SUM;
* parameters that are offloaded to CPU memory are not pinned, which would need a driver;
* FlexAttention has no backward on the CPU: attention runs as SDPA under the same mask, made dense. Packed documents
  stay isolated exactly as FlexAttention isolates them.

`set_up` must run before any torchtitan module other than `torchtitan.config` builds something.
"""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import spmd_types as spmd
import torch
import torch.nn.functional as F
from spmd_types.runtime import get_partition_spec
from torch.distributed.tensor import DTensor

from let_plugin.runtime import console

if TYPE_CHECKING:
    from torchtitan.protocols.model_spec import ModelSpec

_KIB = 1024


def set_up(device: Literal["auto", "cpu"] = "auto") -> torch.device:
    """Prepares this process and returns the device type of the run: an accelerator, if there is one, or the CPU.

    Without torchrun the process becomes rank 0 of 1; no environment variable is needed.
    """
    if "RANK" not in os.environ:
        from torch.distributed.elastic.utils.distributed import get_free_port

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost")
        # A fixed port would make two single-process runs on one machine collide.
        os.environ.setdefault("MASTER_PORT", str(get_free_port()))
    console.quiet()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto" and accelerator is not None:
        return accelerator
    _patch_for_cpu()
    return torch.device("cpu")


def emulates_bfloat16() -> bool:
    """Whether the run is on a CPU without instructions for bfloat16: products of it then take many times longer."""
    from torchtitan.tools import utils

    able = torch.cpu.get_capabilities()
    return utils.device_type == "cpu" and not any(able.get(name) for name in ("avx512_bw", "avx_ne_convert", "bf16"))


def adapt_model_spec(spec: "ModelSpec") -> None:
    """Replaces FlexAttention in a model specification, in place, on the CPU. No-op with an accelerator."""
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.tools import utils

    if utils.device_type != "cpu":
        return
    cpu_attention = _cpu_attention_class()
    for _, config, parent, field_name in list(spec.traverse(FlexAttention.Config)):
        if isinstance(config, cpu_attention.Config):
            continue
        replacement = cpu_attention.Config(
            block_size=config.block_size, param_init=config.param_init, sharding_config=config.sharding_config
        )
        if isinstance(parent, list):
            parent[field_name] = replacement
        else:
            setattr(parent, str(field_name), replacement)


def _patch_for_cpu() -> None:
    from torchtitan.tools import utils

    if isinstance(utils.device_module, CpuDeviceModule):
        return
    device_module = CpuDeviceModule()

    import torchtitan.components.metrics as metrics
    import torchtitan.distributed.context_parallel.api as context_parallel
    import torchtitan.distributed.fsdp as fsdp
    import torchtitan.distributed.parallel_dims as parallel_dims
    import torchtitan.distributed.utils as distributed_utils
    import torchtitan.models.common.attention as attention
    import torchtitan.models.common.token_dispatcher as token_dispatcher

    # `from ... import device_type` copies the value, so each copy is replaced.
    for module in (utils, metrics, parallel_dims, distributed_utils, token_dispatcher):
        for name, value in (("device_type", "cpu"), ("device_module", device_module)):
            if hasattr(module, name):
                setattr(module, name, value)

    fsdp.CPUOffloadPolicy = functools.partial(fsdp.CPUOffloadPolicy, pin_memory=False)
    fsdp.disable_fsdp_gradient_division = functools.partial(_sum_reduction, fsdp.disable_fsdp_gradient_division)
    attention._compiled_create_block_mask = _dense_mask
    context_parallel.cp_shard = functools.partial(_shard_dense_masks, context_parallel.cp_shard)


def _sum_reduction(disable_fsdp_gradient_division: Callable[[Any], None], model: torch.nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    disable_fsdp_gradient_division(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def _dense_mask(mask_mod: Any, B: int | None, H: int | None, L: int, K: int, *, device: Any, **_: Any) -> torch.Tensor:
    """The boolean mask, [B, 1, L, K], that `create_block_mask` would describe in blocks."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask_mod, B, H, L, K, device=str(device))


def _shard_dense_masks(
    cp_shard: Any, cp_mesh: Any, inputs: Any, attention_masks: Any, load_balancer_type: Any = "headtail", **kwargs: Any
) -> Any:
    """torchtitan cuts attention masks that are described in blocks; dense ones, [B, 1, Q, KV], are cut here.

    A rank keeps its own queries and sees the keys of all ranks, in the order of the ranks.
    """
    if not isinstance(attention_masks, torch.Tensor):
        return cp_shard(cp_mesh, inputs, attention_masks, load_balancer_type, **kwargs)
    inputs, _ = cp_shard(cp_mesh, inputs, None, load_balancer_type, **kwargs)
    index_1L = torch.arange(attention_masks.shape[-1], device=attention_masks.device)[None]
    queries = cp_shard(cp_mesh, (index_1L,), None, load_balancer_type)[0][0][0].contiguous()
    keys = torch.empty_like(index_1L[0])
    torch.distributed.all_gather_into_tensor(keys, queries, group=cp_mesh.get_group())
    return inputs, attention_masks.index_select(2, queries).index_select(3, keys)


@functools.cache
def _cpu_attention_class() -> Any:
    """FlexAttention's replacement on the CPU. Made on first use: torchtitan is not imported before `set_up`."""
    from torchtitan.models.common.attention import FlexAttention

    class CpuAttention(FlexAttention):
        """SDPA under the dense mask of `_dense_mask`. Shapes: B batch, L sequence, N heads, H head width."""

        @dataclass(kw_only=True, slots=True)
        class Config(FlexAttention.Config):
            pass

        def forward(
            self,
            q_BLNH: torch.Tensor,
            k_BLNH: torch.Tensor,
            v_BLNH: torch.Tensor,
            *,
            attention_masks: torch.Tensor | None = None,
            scale: float | None = None,
            enable_gqa: bool = False,
            score_mod: Any = None,
            out_transform: Any = None,
            **_: Any,
        ) -> torch.Tensor:
            if score_mod is not None or out_transform is not None:
                raise ValueError("attention with a score_mod or attention sinks needs an accelerator: no CPU kernel")
            if isinstance(attention_masks, DTensor):
                attention_masks = attention_masks.to_local()
            # As FlexAttention: a mask has no type that torchtitan's check knows; what comes out has the queries'.
            with spmd.no_typecheck():
                out_BNLH = F.scaled_dot_product_attention(
                    q_BLNH.transpose(1, 2),
                    k_BLNH.transpose(1, 2),
                    v_BLNH.transpose(1, 2),
                    attn_mask=attention_masks,
                    is_causal=attention_masks is None,
                    scale=scale,
                    enable_gqa=enable_gqa,
                )
                out_BLNH = out_BNLH.transpose(1, 2)
            if spmd.is_type_checking():
                spmd.assert_type(out_BLNH, spmd.get_local_type(q_BLNH), get_partition_spec(q_BLNH))
            return out_BLNH

    return CpuAttention


class CpuDeviceModule:
    """The part of `torch.cuda`'s interface that torchtitan uses. Memory is resident memory of the process, in bytes."""

    peak_is_resettable = True  # until the kernel has refused to reset the peak

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)  # Stream, Event, current_stream, ...

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"

    def get_device_properties(self, device: Any = None) -> Any:
        total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return SimpleNamespace(name=self.get_device_name(), total_memory=total_memory)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = peak_resident_memory()
        peaks = dict.fromkeys(("active_bytes.all.peak", "reserved_bytes.all.peak"), peak)
        return peaks | {"num_alloc_retries": 0, "num_ooms": 0}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Resets the peak to the present value, where the kernel allows it."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or a container that forbids it: the peak is then the process's
            self.peak_is_resettable = False

    def empty_cache(self) -> None:
        """Gives freed memory back to the kernel, as an accelerator's empty_cache gives it back to the driver."""
        # Without glibc the allocator decides by itself.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_resident_memory() -> int:
    """Peak resident memory of this process in bytes, since its start or the last reset."""
    with contextlib.suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * _KIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB  # macOS counts bytes, other systems KiB
