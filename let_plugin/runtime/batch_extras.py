"""Additional tensors of a batch (the teacher's own tokens, stored states), made in the data loader or its workers.

The loader's `collate_fn` is extended, so LET does not depend on the data set. The extras are a function of the batch
alone: there is no state to save, and a resumed run makes the same again.

Shape legend: B batch, L sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from let_plugin.config.errors import ConfigError, Problem

# (a batch's "input" and, for packed documents, "positions", [B, L]; its labels [B, L]) -> name -> tensor [B, ...].
# On the CPU, perhaps in a worker process.
MakeExtras = Callable[[dict[str, torch.Tensor], torch.Tensor], dict[str, torch.Tensor]]

_PREFIX = "let_extra_"


class BatchExtras:
    """Adds tensors to each batch of a data loader that has not begun to iterate: it becomes its `collate_fn`.

    (So it is pickled where workers are not forked.) ConfigError if `loader`, the student's, is not a torch DataLoader.
    """

    def __init__(self, loader: Any, make: MakeExtras) -> None:
        if not isinstance(loader, DataLoader):
            message = "not a torch DataLoader, which can be told to make what LET needs beside the tokens"
            raise ConfigError(Problem("dataloader", message, type(loader).__name__))
        # Shared with the workers, which are started later.
        self._is_on = torch.ones((), dtype=torch.bool).share_memory_()
        self._make: MakeExtras | None = make
        self._collate = loader.collate_fn
        loader.collate_fn = self

    def stop(self) -> None:
        """Ends it: new batches have no extras (those that workers hold ready still do), and `make` is released."""
        self._is_on.fill_(False)
        self._make = None

    def __call__(self, rows: Any) -> Any:
        input_dict, labels_BL = self._collate(rows)
        if not self._is_on or self._make is None:
            return input_dict, labels_BL
        extras = self._make(input_dict, labels_BL)
        return {**input_dict, **{f"{_PREFIX}{name}": tensor for name, tensor in extras.items()}}, labels_BL


def take_extras(input_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the tensors that BatchExtras has added to a batch, if any, and returns them by their own names."""
    names = [name for name in input_dict if name.startswith(_PREFIX)]
    return {name.removeprefix(_PREFIX): input_dict.pop(name) for name in names}
