"""Taps: add gradients to the outputs of parts of the student, from outside.

A forward hook on a block, or on the language-model head, computes the gradient at its output; a gradient hook on that
output adds it in the backward pass. The student's loss and graph do not change. The targets travel as a keyword
argument of the model, so that code that cuts a batch into microbatches cuts them too; a pre-hook on the model takes
them out before `forward` is called.

The hooks sit on the outermost wrapper of a module. Inside an activation-checkpoint wrapper they would run again in the
recomputation, inside a compiled region dynamo would drop them.

Shape legend: B batch, L sequence (this rank's part of it), D student width, E width of the teacher's states, C the
part of the sequence whose logits are there at a time, V this rank's part of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from let_plugin.alignment.losses import Alignment

# Names of the keyword arguments that carry a tap's target, [B, L, ...], and which rows of the batch it has, if not all,
# [B], through the model's forward; the tap's follows.
TARGET_KWARG, ROWS_KWARG = "let_target", "let_rows"

# Names of ranges in a profile: the maths in the forward pass, the addition in the backward pass.
ALIGNMENT_RANGE, INJECTION_RANGE = "let: alignment", "let: injection"

# (hidden state [B, L, D] or logits [B, C, V], the target of these tokens, coefficient 0-dim) -> what it contributes.
PairFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Alignment]


class Tap:
    """What taps have in common. Inert without a target and in evaluation.

    `model` is the student or a pipeline part of it, `places` names where gradients are added: if there are none, the
    tap only takes the target out. `name` makes the names on the model its own, if there are several taps; the functions
    are called in a context that `context` makes, inside the student's forward pass.

    Attributes:
        kwarg, rows_kwarg: The keyword arguments that carry its target, and the rows that it has.
        coefficient: lambda / (number of valid tokens of the whole step), 0-dim fp32. Written in place.
        own_share: By how much the student's own gradient is scaled where a token has a target, 0-dim; None: not at all.
        metric_sums: Each function's sum over this rank's tokens since `reset`; fp32.
        measured: The place at which the two gradients are compared; None: they are not.
        gradient_sums: Sums over this rank's tokens, since `reset`, of <g, a>, <g, g> and <a, a>, where g arrives at the
            measured place, and a is what the tap adds; fp32.
        num_calls: For each place, how many backward passes have taken its gradient along.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[str],
        num_sums: int,
        *,
        device: torch.device,
        name: str = "",
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        own_share: torch.Tensor | None = None,
    ) -> None:
        self.kwarg, self.rows_kwarg = TARGET_KWARG + name, ROWS_KWARG + name
        self.coefficient = torch.zeros((), dtype=torch.float32, device=device)
        self.own_share = own_share
        self.metric_sums = torch.zeros(num_sums, dtype=torch.float32, device=device)
        self.gradient_sums = torch.zeros(3, dtype=torch.float32, device=device)
        # Buffers: before its first step a pipeline runs a microbatch to learn the shapes, and then puts the buffers
        # of its stages back. That microbatch must not count.
        self._buffers = [f"let_metric_sums{name}", f"let_gradient_sums{name}"]
        for buffer, sums in zip(self._buffers, (self.metric_sums, self.gradient_sums), strict=True):
            model.register_buffer(buffer, sums, persistent=False)
        self.measured: str | None = None
        self.num_calls = dict.fromkeys(places, 0)
        self._model = model
        self._context = context
        self._target: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._handles = [model.register_forward_pre_hook(self._take_target, prepend=True, with_kwargs=True)]

    def reset(self) -> None:
        self.metric_sums.zero_()
        self.gradient_sums.zero_()

    def remove(self) -> None:
        """Leaves no trace on the model."""
        for handle in self._handles:
            handle.remove()
        for buffer in self._buffers:
            delattr(self._model, buffer)
        self._target = None

    @torch.compiler.disable
    def _take_target(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = self.kwarg, self.rows_kwarg
        self._target, self._rows = (kwargs.get(name) if self.num_calls else None for name in own)
        return args, {name: value for name, value in kwargs.items() if name not in own}

    def _add(
        self,
        place: str,
        output: torch.Tensor,
        functions: Sequence[PairFunction],
        target: torch.Tensor,
        sums: torch.Tensor,
        part_L: slice = slice(None),
    ) -> None:
        """Has the gradients of the functions added to that of `output`, which a part of the target is of."""
        with self._context(), record_function(ALIGNMENT_RANGE):
            with torch.no_grad():
                target = target[:, part_L]
                local = output.to_local() if isinstance(output, DTensor) else output.detach()
                shape, rows = local.shape, self._rows
                local = local if rows is None else local.index_select(0, rows)
                alignments = [function(local, target, self.coefficient) for function in functions]
                sums += torch.stack([alignment.metric_sum for alignment in alignments])
                gradient = reduce(torch.add, (alignment.gradient_BLD for alignment in alignments))
                scale = None
                if self.own_share is not None:
                    has_target = target.ne(0).any(dim=-1, keepdim=True)
                    scale = torch.where(has_target, self.own_share, 1.0).to(output.dtype)
                if rows is not None:  # nothing is added to the others
                    gradient = gradient.new_zeros(shape).index_copy_(0, rows, gradient)
                    if scale is not None:
                        scale = scale.new_ones(*shape[:2], 1).index_copy_(0, rows, scale)
            self._inject(place, output, gradient.to(output.dtype), scale)

    def _inject(self, place: str, output: torch.Tensor, added: torch.Tensor, scale: torch.Tensor | None) -> None:
        waiting = [added]
        # A hook that knew the output itself would keep it for ever.
        mesh, placements = getattr(output, "device_mesh", None), getattr(output, "placements", ())
        like: Any = {"shape": output.shape, "stride": output.stride()}

        def whole(local: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(local, mesh, placements, run_check=False, **like) if placements else local

        def local(grad: torch.Tensor) -> torch.Tensor:
            return grad.redistribute(placements=placements).to_local() if isinstance(grad, DTensor) else grad

        # A zero-bubble pipeline may run the backward of a node twice, for the inputs and later for the weights. The
        # second one starts from the gradient that the first left behind, which has it already.
        def add_once(grad: torch.Tensor) -> torch.Tensor | None:
            if not waiting:
                return None
            self.num_calls[place] += 1
            added = waiting.pop()
            if place == self.measured:
                self._measure(local(grad), added)
            with record_function(INJECTION_RANGE):
                if scale is not None:
                    return whole(local(grad) * scale + added)
                return grad + whole(added)

        output.register_hook(add_once)

    @torch.no_grad()
    def _measure(self, grad: torch.Tensor, added: torch.Tensor) -> None:
        # In parts: `dot` takes fewer than 2^31 numbers, and logits may be more.
        for g, a in zip(grad.flatten(0, 1).split(2048), added.flatten(0, 1).split(2048), strict=True):
            g, a = g.float().flatten(), a.float().flatten()
            self.gradient_sums += torch.stack([g.dot(a), g.dot(g), a.dot(a)])


class AlignmentTap(Tap):
    """Adds the gradients of pairs to the outputs of `model.layers`.

    Options as those of Tap. `pairs`: name of a block -> its functions. `measured` must be the deepest aligned
    block: at the others, the arriving gradient contains the alignment of deeper ones.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, Sequence[PairFunction]], **options: Any) -> None:
        super().__init__(model, list(pairs), sum(map(len, pairs.values())), **options)
        self._waiting: set[str] = set()  # blocks that have not seen the target yet
        first = 0
        for block, functions in pairs.items():
            sums = self.metric_sums[first : first + len(functions)]
            first += len(functions)
            hook = torch.compiler.disable(partial(self._tap_output, block, functions, sums))
            self._handles.append(model.layers[block].register_forward_hook(hook))  # type: ignore[index, union-attr]

    def _take_target(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._waiting = set(self.num_calls)
        return super()._take_target(module, args, kwargs)

    def _tap_output(self, block: str, functions: Sequence[PairFunction], sums: torch.Tensor, *called: Any) -> None:
        *_, output_BLD = called  # module, its arguments, its output
        target_BLE = self._target
        self._waiting.discard(block)
        if not self._waiting:
            self._target = None  # the last block frees it
        if target_BLE is not None and output_BLD.requires_grad:
            self._add(block, output_BLD, functions, target_BLE, sums)


class LogitTap(Tap):
    """Adds a gradient to the logits of `model.lm_head`, if this part of the model has one.

    A chunked loss calls the head for one part of the sequence after the other, after the model's forward pass.
    Options as those of Tap.
    """

    PLACE = "lm_head"

    def __init__(self, model: nn.Module, function: PairFunction, **options: Any) -> None:
        head: Any = model.lm_head
        super().__init__(model, [self.PLACE] if head is not None else [], 1, **options)
        self._function = function
        self._num_seen = 0  # positions whose logits have been made
        if head is not None:
            self._handles.append(head.register_forward_hook(torch.compiler.disable(self._tap_logits)))

    def _take_target(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._num_seen = 0
        return super()._take_target(module, args, kwargs)

    def _tap_logits(self, module: nn.Module, args: Any, logits_BCV: torch.Tensor) -> None:
        target_BLE = self._target
        if target_BLE is None or not logits_BCV.requires_grad:
            return
        first = self._num_seen
        self._num_seen += (logits_BCV.to_local() if isinstance(logits_BCV, DTensor) else logits_BCV).shape[1]
        if self._num_seen >= target_BLE.shape[1]:
            self._target = None  # the last part frees it
        part_L = slice(first, self._num_seen)
        self._add(self.PLACE, logits_BCV, [self._function], target_BLE, self.metric_sums, part_L)
