"""The control without a teacher: an early block is trained, through the student's own head, to predict the next token.

With the same weight and schedule as an alignment, it shows what an auxiliary gradient at that block does by itself,
without a teacher's knowledge. Norm and language-model head are the student's, and learn from both losses. Their whole
weights are gathered once a step; their gradients are summed over the microbatches where they arise, and added to the
student's once, before these are clipped.

Shape legend: B batch, L sequence (this rank's part of it), D student width, T tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer

from let_plugin import plan
from let_plugin.alignment.losses import Alignment
from let_plugin.alignment.tap import Align
from let_plugin.learned import sum_placements

# Tokens whose logits are there at the same time.
_CHUNK = 2048


class AuxiliaryHead:
    """The student's final norm and language-model head, applied to the outputs of other blocks.

    Args:
        part: The student: the whole of it, on this rank.
        config: The student's configuration.
        sequence_parallel: Whether tensor-parallel ranks hold different parts of the sequence.
        device: This rank's device.
    """

    def __init__(self, part: Any, config: Trainer.Config, *, sequence_parallel: bool, device: torch.device) -> None:
        assert config.model_spec is not None
        # A copy without parameters of its own: FSDP's hooks are on the student's modules.
        with torch.device("meta"):
            self._norm: nn.Module = config.model_spec.model.norm.build()
        self._parameters: dict[str, nn.Parameter] = {
            **{f"norm.{name}": p for name, p in part.norm.named_parameters()},
            **{f"lm_head.{name}": p for name, p in part.lm_head.named_parameters()},
        }
        self._sequence_parallel = sequence_parallel
        self._dtype = plan.math_dtype(config.let)
        self._weights = {name: _whole(p).to(device, copy=True) for name, p in self._parameters.items()}
        self._gradients = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}

    def start_step(self, step: int) -> None:
        """Gathers the weights for this step and clears the gradients."""
        for name, parameter in self._parameters.items():
            self._weights[name].copy_(_whole(parameter))
            self._gradients[name].zero_()

    def align(self, weight: float) -> Align:
        """The gradient of a block, for the tap: of its hidden state [B, L, D] and its labels [B, L], times `weight`."""

        def align(student_BLD: torch.Tensor, labels_BL: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
            gradients, total = [], coefficient.new_zeros(())
            chunks = zip(student_BLD.flatten(0, 1).split(_CHUNK), labels_BL.flatten().split(_CHUNK), strict=True)
            for hidden_TD, labels_T in chunks:
                loss, backward = torch.func.vjp(self._loss_of(labels_T), self._weights, hidden_TD.to(self._dtype))  # type: ignore[misc]
                weight_gradients, gradient_TD = backward(coefficient * weight)
                for name, gradient in weight_gradients.items():
                    self._gradients[name].add_(gradient)
                gradients.append(gradient_TD)
                total = total + loss
            gradient_BLD = torch.cat(gradients).view_as(student_BLD)
            return Alignment(gradient_BLD, gradient_BLD.new_empty(0), total)

        return align

    def reduce(self) -> None:
        """After the last microbatch: adds the gradients of all ranks to the student's."""
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

    def _loss_of(self, labels_T: torch.Tensor) -> Any:
        def loss(weights: dict[str, torch.Tensor], hidden_TD: torch.Tensor) -> torch.Tensor:
            """Sum of the cross-entropies, fp32."""
            cast = {name: weight.to(self._dtype) for name, weight in weights.items()}
            norm = {name.removeprefix("norm."): w for name, w in cast.items() if name.startswith("norm.")}
            normed_TD = torch.func.functional_call(self._norm, norm, (hidden_TD,))
            logits_TV = F.linear(normed_TD, cast["lm_head.weight"], cast.get("lm_head.bias"))
            return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum")

        return loss


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).float()
