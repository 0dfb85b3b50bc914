"""The tap: adds alignment gradients to the outputs of student blocks, from outside.

A forward hook on a block computes the gradient at its output; a gradient hook on that output adds it in the backward
pass. The student's loss and graph do not change. The targets travel as a keyword argument of the model, so that code
that cuts a batch into microbatches cuts them too; a pre-hook on the model takes them out before `forward` is called.

The hooks sit on the outermost wrapper of the block. Inside an activation-checkpoint wrapper they would run again in the
recomputation, inside a compiled region dynamo would drop them.

Shape legend: B batch, L sequence (this rank's part of it), D student width, E width of the teacher's states.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from let_plugin.alignment.losses import Alignment

# Name of the keyword argument that carries the teacher's states, [B, L, E], through the model's forward.
TARGET_KWARG = "let_target"

# Names of ranges in a profile: the maths in the forward pass, the addition in the backward pass.
ALIGNMENT_RANGE, INJECTION_RANGE = "let: alignment", "let: injection"

# (hidden state [B, L, D], the target [B, L, ...], coefficient 0-dim) -> what the pair contributes.
PairFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Alignment]


class AlignmentTap:
    """Adds the gradients of pairs to the outputs of `model.layers`; the target arrives as `TARGET_KWARG`.

    Inert without a target and in evaluation.

    Args:
        model: The student, or a pipeline part of it; anything with a `layers` ModuleDict.
        pairs: Name of a block in `model.layers` -> its pairs. If empty, the tap only takes the target out.
        context: Makes the context in which the pairs are computed, inside the student's forward pass.

    Attributes:
        coefficient: lambda / (number of valid tokens of the whole step), 0-dim fp32. Written in place.
        metric_sums: Each pair's sum of cosines over this rank's tokens since `reset`; fp32.
        measured_block: The block at which the two gradients are compared; None: they are not. It must be the deepest
            aligned one: at the others, the arriving gradient contains the alignment of deeper ones.
        gradient_sums: Sums over this rank's tokens, since `reset`, of <g, a>, <g, g> and <a, a>, where g arrives at the
            measured block's output, and a is what the tap adds; fp32.
        num_calls: For each block, how many backward passes have taken its gradient along.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Mapping[str, Sequence[PairFunction]],
        device: torch.device,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.coefficient = torch.zeros((), dtype=torch.float32, device=device)
        self.metric_sums = torch.zeros(sum(map(len, pairs.values())), dtype=torch.float32, device=device)
        self.gradient_sums = torch.zeros(3, dtype=torch.float32, device=device)
        # Buffers: before its first step a pipeline runs a microbatch to learn the shapes, and then puts the buffers
        # of its stages back. That microbatch must not count.
        model.register_buffer("let_metric_sums", self.metric_sums, persistent=False)
        model.register_buffer("let_gradient_sums", self.gradient_sums, persistent=False)
        self.measured_block: str | None = None
        self.num_calls = dict.fromkeys(pairs, 0)
        self._model = model
        self._context = context
        self._target_BLE: torch.Tensor | None = None
        self._waiting: set[str] = set()  # blocks that have not seen the target yet
        self._handles = [model.register_forward_pre_hook(self._take_target, prepend=True, with_kwargs=True)]
        first = 0
        for block, functions in pairs.items():
            sums = self.metric_sums[first : first + len(functions)]
            first += len(functions)
            hook = torch.compiler.disable(partial(self._tap_output, block, functions, sums))
            self._handles.append(model.layers[block].register_forward_hook(hook))  # type: ignore[index, union-attr]

    def reset(self) -> None:
        self.metric_sums.zero_()
        self.gradient_sums.zero_()

    def remove(self) -> None:
        """Leaves no trace on the model."""
        for handle in self._handles:
            handle.remove()
        del self._model.let_metric_sums, self._model.let_gradient_sums
        self._target_BLE = None

    @torch.compiler.disable
    def _take_target(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._waiting = set(self.num_calls)
        self._target_BLE = kwargs.get(TARGET_KWARG) if self._waiting else None
        return args, {name: value for name, value in kwargs.items() if name != TARGET_KWARG}

    def _tap_output(
        self,
        block: str,
        functions: Sequence[PairFunction],
        metric_sums: torch.Tensor,
        module: nn.Module,
        args: Any,
        output_BLD: torch.Tensor,
    ) -> None:
        target_BLE = self._target_BLE
        self._waiting.discard(block)
        if not self._waiting:
            self._target_BLE = None  # the last block frees it
        if target_BLE is None or not output_BLD.requires_grad:
            return
        with self._context(), record_function(ALIGNMENT_RANGE):
            with torch.no_grad():
                hidden_BLD = output_BLD.to_local() if isinstance(output_BLD, DTensor) else output_BLD.detach()
                alignments = [function(hidden_BLD, target_BLE, self.coefficient) for function in functions]
                metric_sums += torch.stack([alignment.metric_sum for alignment in alignments])
                gradient_BLD = alignments[0].gradient_BLD
                for alignment in alignments[1:]:
                    gradient_BLD = gradient_BLD + alignment.gradient_BLD
            self._inject(block, output_BLD, gradient_BLD.to(output_BLD.dtype))

    def _inject(self, block: str, output_BLD: torch.Tensor, gradient_BLD: torch.Tensor) -> None:
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

        # A zero-bubble pipeline may run the backward of a node twice, for the inputs and later for the weights. The
        # second one starts from the gradient that the first left behind, which has it already.
        def add_once(grad_BLD: torch.Tensor) -> torch.Tensor | None:
            if not waiting:
                return None
            self.num_calls[block] += 1
            added_BLD = waiting.pop()
            if block == self.measured_block:
                self._measure(grad_BLD, added_BLD)
            with record_function(INJECTION_RANGE):
                return grad_BLD + added_BLD

        output_BLD.register_hook(add_once)

    @torch.no_grad()
    def _measure(self, grad_BLD: torch.Tensor, added_BLD: torch.Tensor) -> None:
        if isinstance(grad_BLD, DTensor) and isinstance(added_BLD, DTensor):
            grad_BLD = grad_BLD.redistribute(placements=added_BLD.placements).to_local()
            added_BLD = added_BLD.to_local()
        g, a = grad_BLD.float().flatten(), added_BLD.float().flatten()
        self.gradient_sums += torch.stack([g.dot(a), g.dot(g), a.dot(a)])
