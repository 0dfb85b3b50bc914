"""A loss of the predictions that the student's own head makes of a block's output, in place of an alignment.

* `cross_entropy`, at an early block: the control without a teacher. With the same weight and schedule as an alignment,
  it shows what an auxiliary gradient at that block does by itself, without a teacher's knowledge.
* Logit distillation, at the last block: see `baselines/distillation.py`.

Norm and language-model head are the student's, and learn from both losses. Their whole weights are gathered once a
step; their gradients are summed over the microbatches where they arise, and added to the student's once, before these
are clipped.

Shape legend: B batch, L sequence (this rank's part of it), D student width, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer

from let_plugin.alignment.losses import Alignment
from let_plugin.alignment.tap import Align
from let_plugin.config import plan
from let_plugin.guidance.learned import sum_placements

# (logits [T, V] in fp32, what the tap got for these tokens [T, ...]) -> sum of the tokens' losses.
LogitLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Tokens whose logits are there at the same time.
_CHUNK = 2048


class AuxiliaryHead:
    """The student's final norm and language-model head, applied to the outputs of blocks.

    Every rank of the job makes one. Under pipeline parallelism norm and head live on the last stage: their weights are
    broadcast to the other stages once a step, and the gradients come back once a step.

    Args:
        parts: The student's parts on this rank.
        config: The student's configuration.
        pipeline: The ranks of this rank's pipeline; None without pipeline parallelism.
        sequence_parallel: Whether tensor-parallel ranks hold different parts of the sequence.
        device: This rank's device.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        config: Trainer.Config,
        *,
        pipeline: dist.ProcessGroup | None = None,
        sequence_parallel: bool,
        device: torch.device,
    ) -> None:
        assert config.model_spec is not None
        model: Any = config.model_spec.model
        # Copies without parameters of their own: FSDP's hooks are on the student's modules.
        with torch.device("meta"):
            self._norm: nn.Module = model.norm.build()
            head: nn.Module = model.lm_head.build()
        shapes = {f"norm.{name}": p.shape for name, p in self._norm.named_parameters()}
        shapes |= {f"lm_head.{name}": p.shape for name, p in head.named_parameters()}
        # The student's own, by the same names; empty on the ranks that do not have them.
        self._parameters: dict[str, nn.Parameter] = {}
        for part in parts:
            if part.lm_head is not None:
                self._parameters = {name: part.get_parameter(name) for name in shapes}
        self._pipeline = pipeline
        self._owner = self._find_owner(device)
        self._sequence_parallel = sequence_parallel
        self._dtype = plan.math_dtype(config.let)
        self._weights = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self._gradients = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        # Buffers of the parts: a pipeline's trial run puts them back (see AlignmentTap).
        self._parts = parts
        for part in parts:
            for name, gradient in self._gradients.items():
                part.register_buffer(_buffer_name(name), gradient, persistent=False)

    def start_step(self, step: int) -> None:
        """Gathers the weights for this step and clears the gradients."""
        for name, weight in self._weights.items():
            if self._parameters:
                weight.copy_(_whole(self._parameters[name]))
            if self._pipeline is not None:
                dist.broadcast(weight, self._owner, group=self._pipeline)
            self._gradients[name].zero_()

    def remove(self) -> None:
        """Nothing of it is left on the student."""
        for part in self._parts:
            for name in self._gradients:
                delattr(part, _buffer_name(name))

    def align(self, loss: LogitLoss, weight: float) -> Align:
        """The gradient of a block, for the tap: of its hidden state [B, L, D] and its target [B, L, ...].

        Args:
            loss: Of the predictions and the target; its gradient is taken times `weight`.
            weight: The pair's.
        """

        def align(student_BLD: torch.Tensor, target_BL: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
            gradients, total = [], coefficient.new_zeros(())
            chunks = zip(student_BLD.flatten(0, 1).split(_CHUNK), target_BL.flatten(0, 1).split(_CHUNK), strict=True)
            for hidden_TD, target_T in chunks:
                of_weights = self._loss_of(loss, target_T)
                value, backward = torch.func.vjp(of_weights, self._weights, hidden_TD.to(self._dtype))  # type: ignore[misc]
                weight_gradients, gradient_TD = backward(coefficient * weight)
                for name, gradient in weight_gradients.items():
                    self._gradients[name].add_(gradient)
                gradients.append(gradient_TD)
                total = total + value
            gradient_BLD = torch.cat(gradients).view_as(student_BLD)
            return Alignment(gradient_BLD, gradient_BLD.new_empty(0), total)

        return align

    def reduce(self) -> None:
        """After the last microbatch: adds the gradients of all ranks to the student's."""
        if self._pipeline is not None:
            for gradient in self._gradients.values():
                dist.all_reduce(gradient, group=self._pipeline)
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue  # frozen by the student's own settings
            gradient = self._gradients[name]
            if isinstance(parameter, DTensor):
                placements = sum_placements(parameter, self._sequence_parallel)
                partial = DTensor.from_local(gradient, parameter.device_mesh, placements, run_check=False)
                gradient = partial.redistribute(placements=parameter.placements)
            assert parameter.grad is not None
            parameter.grad.add_(gradient.to(parameter.grad.dtype))  # in place: a captured step writes to this address

    def finish_step(self) -> None:
        """The student's optimizer has done it all."""

    def _find_owner(self, device: torch.device) -> int:
        """The rank of this pipeline that has norm and head."""
        owner = torch.tensor(dist.get_rank() if self._parameters else -1, device=device)
        if self._pipeline is not None:
            dist.all_reduce(owner, dist.ReduceOp.MAX, group=self._pipeline)
        return int(owner.item())

    def _loss_of(self, loss: LogitLoss, target_T: torch.Tensor) -> Any:
        def loss_of(weights: dict[str, torch.Tensor], hidden_TD: torch.Tensor) -> torch.Tensor:
            cast = {name: weight.to(self._dtype) for name, weight in weights.items()}
            norm = {name.removeprefix("norm."): w for name, w in cast.items() if name.startswith("norm.")}
            normed_TD = torch.func.functional_call(self._norm, norm, (hidden_TD,))
            logits_TV = F.linear(normed_TD, cast["lm_head.weight"], cast.get("lm_head.bias"))
            return loss(logits_TV.float(), target_T)

        return loss_of


def cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Sum of the tokens' cross-entropies with their labels, fp32."""
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


def _buffer_name(parameter: str) -> str:
    return f"let_head_gradient__{parameter.replace('.', '__')}"


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).float()
