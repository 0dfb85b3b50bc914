"""The maths of one pair: a block's output and a layer of the teacher meet in a dimension match and a loss.

Shape legend: B batch, L sequence, D student width, E width of the teacher's states.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from let_plugin.alignment.losses import Alignment, AlignmentLoss

Tensors = dict[str, torch.Tensor]  # by the names of a match's parameters


class PairAlignment:
    """Computes what one pair contributes to a microbatch. The tap calls it in the student's forward pass.

    A projector (`let_plugin.guidance.projectors`) fills `weights` and `weight_gradients` once, if the match is trained,
    and then writes in place, so that addresses never change.

    `match`, on the student's device, maps the states of `side`, at `dtype`, to which both states are cast; `channels`
    are the pair's in the teacher's states. `compile_options` are those of torch.compile; None: nothing is compiled.

    Attributes:
        weights: Name -> whole weight of a match that is trained, fp32; empty otherwise.
        weight_gradients: Name -> sum of its gradients over microbatches and this rank's tokens, fp32.
        products: For a match that is fitted: sum over this rank's tokens of the outer products wanted x given, fp32,
            and of given x given below them if it has rows for them; None: they are not summed.
    """

    def __init__(
        self,
        match: nn.Module,
        loss: AlignmentLoss,
        *,
        dtype: torch.dtype = torch.float32,
        side: Literal["teacher", "student"] = "teacher",
        channels: slice = slice(None),
        weight: float = 1.0,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.match = match
        self.weights: dict[str, torch.Tensor] = {}
        self.weight_gradients: dict[str, torch.Tensor] = {}
        self.products: torch.Tensor | None = None
        self._loss = loss
        self._dtype = dtype
        self._matches_teacher = side == "teacher"
        self._channels = channels
        self._weight = weight
        self._compiled_gradients: Callable[..., tuple[Alignment, dict[str, torch.Tensor]]] = self._gradients
        if compile_options is not None:
            # Isolated: the functions of several pairs have one code object and would share one limit of recompilations.
            options = {"fullgraph": True, "isolate_recompiles": True, **compile_options}
            self._compiled_gradients = torch.compile(self._gradients, **options)

    def __call__(self, student_BLD: torch.Tensor, teacher_BLE: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
        """`teacher_BLE`: the states for all pairs, zeros for a token that does not count; `coefficient`: lambda /
        (number of valid tokens of the step), 0-dim fp32."""
        alignment, gradients = self._compiled_gradients(student_BLD, teacher_BLE, coefficient, self.weights)
        for name, gradient in gradients.items():
            self.weight_gradients[name].add_(gradient)
        if self.products is not None:
            student, teacher = (x.flatten(0, 1).float() for x in (student_BLD, teacher_BLE[..., self._channels]))
            student = student * teacher.ne(0).any(dim=-1, keepdim=True)  # without the tokens that do not count
            given, wanted = (teacher, student) if self._matches_teacher else (student, teacher)
            left = wanted if len(self.products) == wanted.shape[1] else torch.cat([wanted, given], dim=1)
            self.products.addmm_(left.T, given)
        return alignment

    def _gradients(
        self, student_BLD: torch.Tensor, teacher_BLE: torch.Tensor, coefficient: torch.Tensor, weights: Tensors
    ) -> tuple[Alignment, Tensors]:
        match, dtype = self.match, self._dtype
        teacher_BLE = teacher_BLE[..., self._channels]
        counts_BL = teacher_BLE.ne(0).any(dim=-1)  # the states of tokens that do not count have been set to zero
        student_BLD, teacher_BLE = student_BLD.to(dtype), teacher_BLE.to(dtype)
        if self._matches_teacher and not weights:
            result = self._loss(student_BLD, match(teacher_BLE), counts_BL, coefficient * self._weight)
            return result._replace(target_gradient_BLD=None), {}

        def project(weights: dict[str, torch.Tensor], hidden_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
            if not self._matches_teacher:
                return torch.func.functional_call(match, weights, (hidden_BLD,)), teacher_BLE
            # Tokens that do not count keep a state of zeros, whatever the projector adds.
            return hidden_BLD, torch.func.functional_call(match, weights, (teacher_BLE,)) * counts_BL[..., None]

        both, backward = torch.func.vjp(project, weights, student_BLD)  # type: ignore[misc]
        result = self._loss(both[0], both[1], counts_BL, coefficient * self._weight)
        weight_gradients, gradient_BLD = backward((result.gradient_BLD, result.target_gradient_BLD))
        return result._replace(gradient_BLD=gradient_BLD, target_gradient_BLD=None), weight_gradients
