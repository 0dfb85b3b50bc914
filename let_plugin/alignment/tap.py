"""The tap: adds the alignment gradient to the output of one student block, from outside.

A forward hook on the block sees its output and forms the gradient there; a gradient hook on that output adds it when
the backward pass comes by. The student's loss, schedule and graph know nothing of it: no autograd node, no view, no
change of type. The target travels as a keyword argument of the model, so whatever cuts a batch into microbatches hands
the right target to the right microbatch; a pre-hook on the model takes it out before `forward` sees it.

The hook sits on the outermost wrapper of the block. Inside an activation-checkpoint wrapper it would run again in the
recomputation, inside a compiled region dynamo would drop it.

Shape legend: B batch, L sequence, D student width, E teacher width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from let_plugin.alignment.losses import Alignment

# Name of the keyword argument that carries the target, [B, L, E], through the model's forward.
TARGET_KWARG = "let_target"

Align = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Alignment]


class AlignmentTap:
    """Aligns the output of `model.layers[block]` with the targets that arrive as `TARGET_KWARG`.

    Inert without a target and in evaluation. `remove` leaves no trace on the model.

    Args:
        model: The student, or the pipeline part of it that holds the block; anything with a `layers` ModuleDict.
        block: Name of the block in `model.layers`.
        align: (hidden state [B, L, D], target [B, L, E], coefficient 0-dim) -> Alignment.
        device: Where the coefficient and the metric live.

    Attributes:
        coefficient: lambda / (number of valid tokens of the whole step), 0-dim fp32. Written in place before each
            forward pass, so that its address never changes and no step waits for the host.
        cosine_sum: Sum of the cosines over this rank's tokens since `reset`, 0-dim fp32.
        num_calls: How often the tap has aligned something since it was attached.
    """

    def __init__(self, model: nn.Module, block: str, align: Align, device: torch.device) -> None:
        self.coefficient = torch.zeros((), dtype=torch.float32, device=device)
        self.cosine_sum = torch.zeros((), dtype=torch.float32, device=device)
        self.num_calls = 0
        self._align = align
        self._target_BLE: torch.Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._take_target, prepend=True, with_kwargs=True),
            model.layers[block].register_forward_hook(self._inject),  # type: ignore[index, union-attr]
        ]

    def reset(self) -> None:
        """Starts a new step's metric."""
        self.cosine_sum.zero_()

    def remove(self) -> None:
        """Detaches the tap; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._target_BLE = None

    @torch.compiler.disable
    def _take_target(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if TARGET_KWARG not in kwargs:
            return None
        kwargs = dict(kwargs)
        self._target_BLE = kwargs.pop(TARGET_KWARG)
        return args, kwargs

    @torch.compiler.disable
    def _inject(self, module: nn.Module, args: Any, hidden_BLD: torch.Tensor) -> None:
        target_BLE, self._target_BLE = self._target_BLE, None
        if target_BLE is None or not hidden_BLD.requires_grad:
            return
        with torch.no_grad():
            gradient_BLD, cosine_sum = self._align(hidden_BLD.detach(), target_BLE, self.coefficient)
            gradient_BLD = gradient_BLD.to(hidden_BLD.dtype)
            self.cosine_sum += cosine_sum
        self.num_calls += 1
        hidden_BLD.register_hook(lambda grad_BLD: grad_BLD + gradient_BLD)
