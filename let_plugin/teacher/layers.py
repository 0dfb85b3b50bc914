"""Takes the states of chosen layers out of a teacher's forward pass, from outside: with hooks on its blocks.

Shape legend: B batch, L sequence, E width of a layer's state; after the concatenation, the sum of these widths.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from let_plugin.alignment.layer_mapping import EMBEDDING


class LayerStates:
    """The states of some `layers` of a model (see TeacherSource.build), concatenated along channels.

    Its hooks live as long as `blocks`, those that run, as the model calls them: compiled and wrapped; FSDP2 may come
    later. `output_layer` is the one whose state the model returns, None if that is none of the layers.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Sequence[int | str], *, output_layer: int | None) -> None:
        self._layers = tuple(layers)
        self._output_layer = output_layer
        self._states: dict[int | str, torch.Tensor] = {}
        for layer in layers:
            if isinstance(layer, str):
                blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            elif layer != output_layer:
                blocks[layer].register_forward_hook(torch.compiler.disable(partial(self._keep_output, layer)))

    def collect(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The layers' states in `forward()`, which runs the model, [B, L, E]; of a single layer without a copy."""
        try:
            output_BLE = forward()
            if self._output_layer is not None:
                self._states[self._output_layer] = output_BLE
            missing = [layer for layer in self._layers if layer not in self._states]
            if missing:
                raise RuntimeError(f"the hooks of the teacher's layers {missing} did not run")
            states = [self._states[layer] for layer in self._layers]
        finally:
            self._states.clear()
        # Of a tensor-parallel teacher, each rank gets the whole.
        states = [state.full_tensor() if isinstance(state, DTensor) else state for state in states]
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1)

    # The hooks stay out of compiled regions: dynamo would drop what they keep.

    @torch.compiler.disable
    def _keep_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first time: some models run their blocks in loops.
        self._states.setdefault(EMBEDDING, args[0] if args else kwargs["hidden_states"])

    def _keep_output(self, layer: int, block: nn.Module, args: Any, output: Any) -> None:
        self._states[layer] = output[0] if isinstance(output, tuple) else output
