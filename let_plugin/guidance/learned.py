"""The state of a projector that learns: where its weights lie, who trains them, and how a checkpoint keeps them.

The projector is a guest on the pipeline part that holds the aligned block. Its parameters lie on the block's own device
mesh, so that torchtitan clips them with the student's; but they are in no state dict of the student and in none of its
optimizers, so that a checkpoint of the student is that of plain torchtitan. They have an optimizer and a learning-rate
schedule of their own, built from the student's settings, and a place of their own in the run's checkpoint, from which
they are read when the alignment starts: only then is it known whether the run needs them.

Each step all-gathers the weights once, sums the gradients of the microbatches where they arise, and reduces them once.
"""

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torchtitan.trainer import Trainer

from let_plugin.config import ProjectorConfig
from let_plugin.runtime.upstream import OptimizersContainer

# Name of the module on the student, and of the state in a checkpoint; that of a pair ends in its number.
PROJECTOR = "let_projector"


class LearnedProjector(Stateful):
    """Trains a projector beside the student.

    Args:
        projector: The module, on the CPU, with the weights that it starts from.
        part: The student, or the pipeline part of it that holds the aligned block.
        block: Name of that block in `part.layers`.
        config: The student's configuration.
        index: Number of its pair.
        sequence_parallel: Whether tensor-parallel ranks hold different parts of the sequence, so that their gradients
            add up, rather than all the same.
        device: This rank's device.
    """

    def __init__(
        self,
        projector: nn.Module,
        part: nn.Module,
        block: str,
        config: Trainer.Config,
        *,
        index: int = 0,
        sequence_parallel: bool,
        device: torch.device,
    ) -> None:
        self.name = f"{PROJECTOR}_{index}"
        self._part = part
        self._module = nn.Module()  # holds the parameters, flat: dots are not allowed in their names
        self._names = {name: name.replace(".", "__") for name, _ in projector.named_parameters()}
        like = dense_parameter(part.get_submodule(f"layers.{block}"))
        for name, parameter in projector.named_parameters():
            weight = parameter.detach().to(device, torch.float32)
            self._module.register_parameter(self._names[name], nn.Parameter(_distribute(weight, like)))
        self._sum_placements = sum_placements(like, sequence_parallel)
        # Non-persistent buffers of the part: a pipeline's trial run puts them back (see AlignmentTap).
        for name, parameter in projector.named_parameters():
            gradient = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
            self._module.register_buffer(_gradient_name(self._names[name]), gradient, persistent=False)
        part.register_module(self.name, self._module)
        self._hook = part.register_state_dict_post_hook(_hide)
        self._optimizers = _optimizer_config(config).build(model_parts=[self._module])
        self._lr_schedulers = config.lr_scheduler.build(
            optimizers=self._optimizers, training_steps=config.training.steps
        )
        # The whole weights. Written in place, so that their addresses never change.
        self.weights = {name: parameter.detach().to(device).clone() for name, parameter in projector.named_parameters()}

    def start_step(self, step: int) -> None:
        """Gathers the weights for this step and clears the gradients."""
        self._optimizers.zero_grad()
        for name, flat in self._names.items():
            parameter = self._module.get_parameter(flat).detach()
            self.weights[name].copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
            self._module.get_buffer(_gradient_name(flat)).zero_()

    def accumulate(self, gradients: dict[str, torch.Tensor]) -> None:
        """Adds the gradients of one microbatch, of this rank's tokens."""
        for name, gradient in gradients.items():
            self._module.get_buffer(_gradient_name(self._names[name])).add_(gradient)

    def reduce(self) -> None:
        """After the last microbatch: sums the gradients over the ranks, where the student's clipping finds them."""
        for flat in self._names.values():
            parameter = self._module.get_parameter(flat)
            gradient = self._module.get_buffer(_gradient_name(flat))
            if isinstance(parameter, DTensor):
                partial = DTensor.from_local(gradient, parameter.device_mesh, self._sum_placements, run_check=False)
                parameter.grad = partial.redistribute(placements=parameter.placements)
            else:
                parameter.grad = gradient.clone()

    def finish_step(self) -> None:
        """Takes the optimizer step, after the gradients have been clipped."""
        self._optimizers.step()
        self._lr_schedulers.step()

    def remove(self) -> None:
        """Takes the projector off the student: nothing of it is left."""
        self._hook.remove()
        delattr(self._part, self.name)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {flat: self._module.get_parameter(flat).detach() for flat in self._names.values()},
            "optimizer": self._optimizers.state_dict(),
            "lr_scheduler": self._lr_schedulers.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            for flat, weight in state_dict["weights"].items():
                self._module.get_parameter(flat).copy_(weight)
        self._optimizers.load_state_dict(state_dict["optimizer"])
        self._lr_schedulers.load_state_dict(state_dict["lr_scheduler"])


def _gradient_name(parameter: str) -> str:
    return f"{parameter}__gradient"


def _hide(part: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}{PROJECTOR}_")]:
        del state_dict[name]


def dense_parameter(block: nn.Module) -> nn.Parameter:
    """A parameter whose mesh is the one that the student's gradients are clipped on: not an expert's."""
    for parameter in block.parameters():
        if not isinstance(parameter, DTensor) or "ep" not in (parameter.device_mesh.mesh_dim_names or ()):
            return parameter
    raise AssertionError("a block whose parameters are all experts")


def _distribute(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`weight`, the same on all ranks, on the device mesh of `like`: sharded where FSDP shards."""
    if not isinstance(like, DTensor):
        return weight
    replicated = {"dp_replicate", "tp"}
    placements: list[Placement] = [
        Replicate() if name in replicated else Shard(0) for name in like.device_mesh.mesh_dim_names or ()
    ]
    return distribute_tensor(weight, like.device_mesh, placements, src_data_rank=None)


def sum_placements(like: torch.Tensor, sequence_parallel: bool) -> list[Placement]:
    """How a sum over this rank's tokens lies on the mesh of `like`: to be added up, but for replicas."""
    if not isinstance(like, DTensor):
        return []
    names = like.device_mesh.mesh_dim_names or ()
    return [Replicate() if name == "tp" and not sequence_parallel else Partial() for name in names]


def _optimizer_config(config: Trainer.Config) -> OptimizersContainer.Config:
    """The settings that the student's optimizer has for a parameter of the projector's name, and `[let.projector]`."""
    projector: ProjectorConfig = config.let.projector
    for group in config.optimizer.param_groups:
        if re.search(group.pattern, f"{PROJECTOR}.weight"):
            kwargs = dict(group.optimizer_kwargs)
            if "lr" in kwargs:
                kwargs["lr"] *= projector.lr_multiplier
            if projector.weight_decay is not None:
                kwargs["weight_decay"] = projector.weight_decay
            groups = [dataclasses.replace(group, pattern=".*", optimizer_kwargs=kwargs)]
            return dataclasses.replace(config.optimizer, param_groups=groups)
    raise AssertionError("torchtitan's optimizers cover every parameter")
