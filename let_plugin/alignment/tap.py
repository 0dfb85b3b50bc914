"""The tap: adds the alignment gradient to the output of one student block, from outside.

A forward hook on the block sees its output and forms the gradient there; a gradient hook on that output adds it when
the backward pass comes by. The student's loss, schedule and graph know nothing of it: no autograd node, no view, no
change of type. The target travels as a keyword argument of the model, so whatever cuts a batch into microbatches hands
the right target to the right microbatch; a pre-hook on the model takes it out before `forward` sees it.

The hook sits on the outermost wrapper of the block. Inside an activation-checkpoint wrapper it would run again in the
recomputation, inside a compiled region dynamo would drop it.

Shape legend: B batch, L sequence (this rank's part of it), D student width, E teacher width.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from let_plugin.alignment.losses import Alignment

# Name of the keyword argument that carries the target, [B, L, E], through the model's forward.
TARGET_KWARG = "let_target"

# Name of the buffer that sums the cosines.
COSINE_BUFFER = "let_cosine_sum"

Align = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Alignment]


class AlignmentTap:
    """Aligns the output of `model.layers[block]` with the targets that arrive as `TARGET_KWARG`.

    Inert without a target and in evaluation. `remove` leaves no trace on the models.

    Args:
        model: The student, or the pipeline part of it that holds the block; anything with a `layers` ModuleDict.
        block: Name of the block in `model.layers`.
        align: (hidden state [B, L, D], target [B, L, E], coefficient 0-dim) -> Alignment.
        device: Where the coefficient and the metric live.
        other_models: The other parts of the student on this rank. A pipeline schedule hands the target to all of them.
        context: Makes the context that the alignment is computed in, inside the student's forward pass.

    Attributes:
        coefficient: lambda / (number of valid tokens of the whole step), 0-dim fp32. Written in place before each
            forward pass, so that its address never changes and no step waits for the host.
        cosine_sum: Sum of the cosines over this rank's tokens since `reset`, 0-dim fp32.
        num_calls: How often a backward pass has taken the tap's gradient along since the tap was attached.
    """

    def __init__(
        self,
        model: nn.Module,
        block: str,
        align: Align,
        device: torch.device,
        *,
        other_models: Iterable[nn.Module] = (),
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.coefficient = torch.zeros((), dtype=torch.float32, device=device)
        self.cosine_sum = torch.zeros((), dtype=torch.float32, device=device)
        # A buffer: before its first step a pipeline runs a microbatch to learn the shapes, and then puts the buffers
        # of its stages back. That microbatch must not count.
        model.register_buffer(COSINE_BUFFER, self.cosine_sum, persistent=False)
        self.num_calls = 0
        self._model = model
        self._align = align
        self._context = context
        self._target_BLE: torch.Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._take_target, prepend=True, with_kwargs=True),
            model.layers[block].register_forward_hook(self._inject),  # type: ignore[index, union-attr]
        ]
        for other in other_models:
            self._handles.append(other.register_forward_pre_hook(_drop_target, prepend=True, with_kwargs=True))

    def reset(self) -> None:
        """Starts a new step's metric."""
        self.cosine_sum.zero_()

    def remove(self) -> None:
        """Detaches the tap; the models are as they were before."""
        for handle in self._handles:
            handle.remove()
        delattr(self._model, COSINE_BUFFER)
        self._target_BLE = None

    @torch.compiler.disable
    def _take_target(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._target_BLE = kwargs.get(TARGET_KWARG)
        return _drop_target(module, args, kwargs)

    @torch.compiler.disable
    def _inject(self, module: nn.Module, args: Any, output_BLD: torch.Tensor) -> None:
        target_BLE, self._target_BLE = self._target_BLE, None
        if target_BLE is None or not output_BLD.requires_grad:
            return
        with self._context():
            self._align_output(output_BLD, target_BLE)

    def _align_output(self, output_BLD: torch.Tensor, target_BLE: torch.Tensor) -> None:
        with torch.no_grad():
            hidden_BLD = output_BLD.to_local() if isinstance(output_BLD, DTensor) else output_BLD.detach()
            alignment = self._align(hidden_BLD, target_BLE, self.coefficient)
            self.cosine_sum += alignment.cosine_sum
            gradient_BLD = alignment.gradient_BLD.to(output_BLD.dtype)
        if isinstance(output_BLD, DTensor):
            gradient_BLD = DTensor.from_local(
                gradient_BLD,
                output_BLD.device_mesh,
                output_BLD.placements,
                run_check=False,
                shape=output_BLD.shape,
                stride=output_BLD.stride(),
            )
        waiting = [gradient_BLD]

        # Adds the gradient the first time it is called, and forgets it. A zero-bubble pipeline may run the backward of
        # a node twice, for the inputs and later for the weights, the second time from the gradient that the first left
        # behind: what was added must not be added again.
        def add_once(grad_BLD: torch.Tensor) -> torch.Tensor | None:
            if not waiting:
                return None
            self.num_calls += 1
            return grad_BLD + waiting.pop()

        output_BLD.register_hook(add_once)


def _drop_target(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != TARGET_KWARG}
