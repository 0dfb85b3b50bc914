"""The state of a dimension match that learns: where its weights lie, who changes them, how a checkpoint keeps them.

A projector is a guest on the pipeline part that holds the aligned block. It is in no state dict of the student and in
none of its optimizers, so a checkpoint of the student is that of plain torchtitan. Its own state is restored when the
alignment starts: only then is it known whether the run needs it.
"""

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torchtitan.trainer import Trainer

from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import FittedMatch
from let_plugin.config import ProjectorConfig
from let_plugin.runtime.upstream import OptimizersContainer

# Name of the module on the student, and of the state in a checkpoint; that of a pair ends in its number.
PROJECTOR = "let_projector"


class LearnedProjector(Stateful):
    """Trains the match of a pair beside the student.

    The parameters lie on the block's own device mesh, so that torchtitan clips them with the student's. They have an
    optimizer and a learning-rate schedule of their own, built from the student's settings. Each step all-gathers the
    weights once, sums the gradients of the microbatches where they arise, and reduces them once.

    `pair`, on its device, gets the weights to compute with, and where to sum their gradients; `index` is its number
    among those of all terms. `block` is the name of its block in the `layers` of `part`, the student or a pipeline part
    of it. `config` is the student's, `settings` the term's `[let.projector]`.
    """

    def __init__(
        self,
        pair: PairAlignment,
        part: nn.Module,
        block: str,
        config: Trainer.Config,
        *,
        settings: ProjectorConfig,
        index: int,
    ) -> None:
        self.name = f"{PROJECTOR}_{index}"
        self.weights = pair.weights
        self._gradients = pair.weight_gradients
        self._part = part
        self._module = nn.Module()  # holds the parameters, flat: dots are not allowed in their names
        self._names = {name: name.replace(".", "__") for name, _ in pair.match.named_parameters()}
        like = _dense_parameter(part.get_submodule(f"layers.{block}"))
        self._sequence_parallel = config.parallelism.enable_sequence_parallel
        for name, initial in pair.match.named_parameters():
            weight = initial.detach().float()
            self._module.register_parameter(self._names[name], nn.Parameter(_distribute(weight, like)))
            self.weights[name] = initial.detach().clone()
            self._gradients[name] = torch.zeros_like(weight)
            # A non-persistent buffer of the part: a pipeline's trial run puts it back (see AlignmentTap).
            self._module.register_buffer(f"{self._names[name]}__gradient", self._gradients[name], persistent=False)
        part.register_module(self.name, self._module)
        self._hook = part.register_state_dict_post_hook(_hide)
        self._optimizers = _optimizer_config(config, settings).build(model_parts=[self._module])
        self._schedulers = config.lr_scheduler.build(optimizers=self._optimizers, training_steps=config.training.steps)

    def start_step(self, step: int) -> None:
        """Gathers the weights for this step and clears the gradients."""
        self._optimizers.zero_grad()
        for name, flat in self._names.items():
            parameter = self._module.get_parameter(flat).detach()
            self.weights[name].copy_(whole(parameter))
            self._gradients[name].zero_()

    def reduce(self) -> None:
        """After the last microbatch: sums the gradients over the ranks, where the student's clipping finds them."""
        for name, flat in self._names.items():
            parameter: Any = self._module.get_parameter(flat)
            gradient = summed(self._gradients[name], parameter, self._sequence_parallel)
            is_cut = isinstance(gradient, DTensor)
            parameter.grad = gradient.redistribute(placements=parameter.placements) if is_cut else gradient.clone()

    def finish_step(self) -> None:
        """Takes the optimizer step, after the gradients have been clipped."""
        self._optimizers.step()
        self._schedulers.step()

    def remove(self) -> None:
        self._hook.remove()
        delattr(self._part, self.name)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {flat: self._module.get_parameter(flat).detach() for flat in self._names.values()},
            "optimizer": self._optimizers.state_dict(),
            "lr_scheduler": self._schedulers.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for flat, weight in state_dict["weights"].items():
            self._module.get_parameter(flat).detach().copy_(weight)
        self._optimizers.load_state_dict(state_dict["optimizer"])
        self._schedulers.load_state_dict(state_dict["lr_scheduler"])


class FittedProjector:
    """Fits the match of a pair to the tokens of the steps that it asks for, for the steps after them.

    The sum over tokens of the outer products of the two states is all that such a fit needs: it adds up over
    microbatches and ranks, and every rank fits the same weight. Arguments as those of LearnedProjector.
    """

    def __init__(
        self, pair: PairAlignment, part: nn.Module, block: str, config: Trainer.Config, *, index: int | str
    ) -> None:
        assert isinstance(pair.match, FittedMatch)
        self.name = f"{PROJECTOR}_{index}"
        self._match = pair.match
        self.state_dict, self.load_state_dict = pair.match.state_dict, pair.match.load_state_dict
        self._pair = pair
        self._part = part
        self.like = _dense_parameter(part.get_submodule(f"layers.{block}"))
        self._sequence_parallel = config.parallelism.enable_sequence_parallel
        width, in_width = pair.match.weight.shape
        num_products = width + in_width if pair.match.wants_squares else width
        self._products = pair.match.weight.new_zeros(num_products, in_width)
        # A buffer of the part: a pipeline's trial run puts it back (see AlignmentTap).
        part.register_buffer(self.name, self._products, persistent=False)

    def start_step(self, step: int) -> None:
        self._pair.products = self._products.zero_() if self._match.is_fitted_in(step) else None

    def reduce(self) -> None:
        """After the last microbatch: sums over the ranks."""
        if self._pair.products is not None:
            self._products.copy_(whole(summed(self._products, self.like, self._sequence_parallel)))

    @torch.no_grad()
    def finish_step(self) -> None:
        """Fits the weight, for the next step on."""
        if self._pair.products is not None:
            self._match.fit(self._products)

    def remove(self) -> None:
        delattr(self._part, self.name)


class FittedThenLearned(LearnedProjector):
    """Trains the match of a pair from where it has been fitted to. Arguments as those of LearnedProjector."""

    def __init__(self, pair: PairAlignment, part: nn.Module, block: str, config: Trainer.Config, **kwargs: Any) -> None:
        super().__init__(pair, part, block, config, **kwargs)
        self._fitted = FittedProjector(pair, part, block, config, index=f"{kwargs['index']}_fit")
        self._pair: Any = pair

    def start_step(self, step: int) -> None:
        if self._pair.match.is_fitted_in(step - 1):  # a checkpoint of a step that fits has given the optimizer a state
            for optimizer in self._optimizers:
                optimizer.state.clear()
        super().start_step(step)
        self._fitted.start_step(step)

    def reduce(self) -> None:
        if self._pair.products is not None:
            self._fitted.reduce()
        else:
            super().reduce()

    def finish_step(self) -> None:
        super().finish_step()  # without a gradient in a step that fits
        self._fitted.finish_step()
        if self._pair.products is not None:
            weight = _distribute(self._pair.match.weight.detach(), self._fitted.like)
            self._module.get_parameter("weight").detach().copy_(weight)

    def remove(self) -> None:
        super().remove()
        self._fitted.remove()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fitted": self._fitted.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._fitted.load_state_dict(state_dict["fitted"])


def _hide(part: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}{PROJECTOR}_")]:
        del state_dict[name]


def _dense_parameter(block: nn.Module) -> nn.Parameter:
    """A parameter whose mesh is the one that the student's gradients are clipped on: not an expert's."""
    for parameter in block.parameters():
        if not isinstance(parameter, DTensor) or "ep" not in (parameter.device_mesh.mesh_dim_names or ()):
            return parameter
    raise AssertionError("a block whose parameters are all experts")


def _distribute(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`weight`, the same on all ranks, on the device mesh of `like`: sharded where FSDP shards."""
    if not isinstance(like, DTensor):
        return weight
    names = like.device_mesh.mesh_dim_names or ()
    placements = [Replicate() if name in ("dp_replicate", "tp") else Shard(0) for name in names]
    return distribute_tensor(weight, like.device_mesh, placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def summed(own: torch.Tensor, like: torch.Tensor, sequence_parallel: bool) -> Any:
    """A sum over this rank's tokens as one over those of all ranks of the mesh of `like`; itself if that has none."""
    if not isinstance(like, DTensor):
        return own
    names = like.device_mesh.mesh_dim_names or ()
    placements = [Replicate() if name == "tp" and not sequence_parallel else Partial() for name in names]
    return DTensor.from_local(own, like.device_mesh, placements, run_check=False)


def _optimizer_config(config: Trainer.Config, projector: ProjectorConfig) -> OptimizersContainer.Config:
    """The settings that the student's optimizer has for a parameter of the projector's name, and `[let.projector]`."""
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
