"""The cross-entropy of the predictions that the student's own head makes from an early block's output.

What an auxiliary gradient there does without a teacher's knowledge. Norm and language-model head are the student's, and
learn from both losses. Their whole weights are gathered once a step; their gradients are summed over the microbatches,
and added to the student's once, before these are clipped.

Shape legend: B batch, L sequence (this rank's part of it), D student width, T tokens, V vocabulary.
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer

from let_plugin.alignment.losses import Alignment
from let_plugin.alignment.tap import PairFunction
from let_plugin.guidance.projectors import summed, whole

_CHUNK = 2048  # tokens whose logits are there at the same time


class AuxiliaryHead:
    """The student's final norm and language-model head, applied to the outputs of blocks.

    Every rank of the job makes one; `name` tells those of several terms apart. Norm and head live on a pipeline's last
    stage: once a step their weights are broadcast to the other stages, and the gradients are summed over them.
    """

    def __init__(self, trainer: Trainer, name: str = "") -> None:
        config, dims, device = trainer.config, trainer.parallel_dims, trainer.device
        assert config.model_spec is not None
        model: Any = config.model_spec.model
        # Copies without parameters of their own: FSDP's hooks are on the student's modules.
        with torch.device("meta"):
            self._head = nn.Sequential(OrderedDict(norm=model.norm.build(), lm_head=model.lm_head.build()))
        shapes = {name: p.shape for name, p in self._head.named_parameters()}
        # The student's own, by the same names; empty on the ranks that do not have them.
        self._parameters: dict[str, nn.Parameter] = {}
        for part in trainer.model_parts:
            if part.lm_head is not None:
                self._parameters = {name: part.get_parameter(name) for name in shapes}
        self._pipeline = dims.get_mesh("pp").get_group() if dims.pp_enabled else None
        # The rank of this pipeline that has norm and head.
        owner = torch.tensor(dist.get_rank() if self._parameters else -1, device=device)
        if self._pipeline is not None:
            dist.all_reduce(owner, dist.ReduceOp.MAX, group=self._pipeline)
        self._owner = int(owner.item())
        self._sequence_parallel = config.parallelism.enable_sequence_parallel
        self._dtype: torch.dtype = getattr(torch, config.training.mixed_precision_param)  # of the student's own head
        self._weights = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self._gradients = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        # Buffers of the parts: a pipeline's trial run puts them back (see AlignmentTap).
        self._parts = trainer.model_parts
        self._buffers = {f"let_head_gradient{name}__{w.replace('.', '__')}": g for w, g in self._gradients.items()}
        for part in self._parts:
            for buffer, gradient in self._buffers.items():
                part.register_buffer(buffer, gradient, persistent=False)

    def start_step(self, step: int) -> None:
        """Gathers the weights for this step and clears the gradients."""
        for name, weight in self._weights.items():
            if self._parameters:
                weight.copy_(whole(self._parameters[name].detach()))
            if self._pipeline is not None:
                dist.broadcast(weight, self._owner, group=self._pipeline)
            self._gradients[name].zero_()

    def remove(self) -> None:
        for part in self._parts:
            for buffer in self._buffers:
                delattr(part, buffer)

    def pair(self, weight: float) -> PairFunction:
        """What the tap calls for one block, with the labels as target; the gradient is taken times `weight`."""
        return partial(self._head_gradients, weight)

    def reduce(self) -> None:
        """After the last microbatch: adds the gradients of all ranks to the student's."""
        if self._pipeline is not None:
            for gradient in self._gradients.values():
                dist.all_reduce(gradient, group=self._pipeline)
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue  # frozen by the student's own settings
            gradient = summed(self._gradients[name], parameter, self._sequence_parallel)
            if isinstance(parameter, DTensor):
                gradient = gradient.redistribute(placements=parameter.placements)
            assert parameter.grad is not None
            # In place: a captured step writes to this address. Under CPU offload it is in CPU memory.
            parameter.grad.add_(gradient.to(parameter.grad.device, parameter.grad.dtype))

    def finish_step(self) -> None:
        pass

    def _head_gradients(
        self, weight: float, student_BLD: torch.Tensor, labels_BL: torch.Tensor, coefficient: torch.Tensor
    ) -> Alignment:
        gradients, total = [], coefficient.new_zeros(())
        chunks = zip(student_BLD.flatten(0, 1).split(_CHUNK), labels_BL.flatten().split(_CHUNK), strict=True)
        for hidden_TD, labels_T in chunks:
            of_weights = partial(self._loss, labels_T)
            value, backward = torch.func.vjp(of_weights, self._weights, hidden_TD.to(self._dtype))  # type: ignore[misc]
            weight_gradients, gradient_TD = backward(coefficient * weight)
            for name, gradient in weight_gradients.items():
                self._gradients[name].add_(gradient)
            gradients.append(gradient_TD)
            total = total + value
        return Alignment(torch.cat(gradients).view_as(student_BLD), None, total)

    def _loss(self, labels_T: torch.Tensor, weights: dict[str, torch.Tensor], hidden_TD: torch.Tensor) -> torch.Tensor:
        """Sum of the tokens' cross-entropies with their labels, fp32."""
        cast = {name: weight.to(self._dtype) for name, weight in weights.items()}
        logits_TV = torch.func.functional_call(self._head, cast, (hidden_TD,))
        return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum")
