"""`let.teacher.quantization`: int8 weights for the teacher's linear layers, by torchao.

Each row of a weight has one scale (symmetric, its largest absolute value / 127); activations and maths stay in the
teacher's data type. Only `nn.Linear` is quantised: embeddings, norms, GPT-2's Conv1D and fused experts are not.

torchao's int8 tensors cannot be sharded by FSDP2 (no `aten.split`, no all-gather hooks; torchao 0.18): a quantised
teacher is held whole by each rank.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem

_KEY = "let.teacher.quantization"


def check(config: TeacherConfig) -> None:
    """ConfigError if it asks for a quantisation that cannot be had."""
    if config.quantization == "none":
        return
    problems = []
    if find_spec("torchao") is None:
        problems.append(Problem(_KEY, "it needs the torchao package: pip install torchao", config.quantization))
    if config.cpu_offload:
        message = "not together with let.teacher.cpu_offload: FSDP2, which offloads, cannot hold int8 weights"
        problems.append(Problem(_KEY, message, config.quantization))
    if problems:
        raise ConfigError(problems)


def check_has_linear(config: TeacherConfig, trunk: nn.Module) -> None:
    """ConfigError if there is nothing in the teacher that its `quantization` would change."""
    if config.quantization != "none" and not num_linear_params(trunk):
        message = "the teacher has no nn.Linear layers to quantise (GPT-2 has Conv1D ones); set it to none"
        raise ConfigError(Problem(_KEY, message, config.quantization))


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """The layers in it, itself included, that are quantised."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def num_linear_params(module: nn.Module) -> int:
    """How many weights `quantize_linear` would turn into int8."""
    return sum(layer.weight.numel() for layer in linear_layers(module))


def quantize_linear(module: nn.Module) -> None:
    """Quantises the weights of the linear layers in `module`, itself included, in place."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # The inductor settings that torchao recommends are global: they would be the student's as well.
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    for layer in linear_layers(module):
        quantize_(layer, config)


def num_bytes(parameter: torch.Tensor) -> int:
    """Memory of a parameter on this rank, int8 and sharded ones included, in bytes."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        parameter = parameter.to_local()
    parts: Any = parameter
    return parts.qdata.nbytes + parts.scale.nbytes if hasattr(parameter, "qdata") else parameter.nbytes
