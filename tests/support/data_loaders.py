"""A data loader whose global batch is the same on any number of data-parallel ranks."""

from dataclasses import dataclass

import torch
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader


class GlobalOrderDataLoader(HuggingFaceTextDataLoader):
    """Every rank reads the whole stream in batches of the global size, and takes its own rows."""

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTextDataLoader.Config):
        ignore_every: int = 0
        """Labels that this divides are ignored, and the first half of every row that begins with an even token: ranks
        and microbatches have different numbers of valid tokens, and a row the same ones wherever it goes."""

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **kwargs):
        super().__init__(
            config, dp_world_size=1, dp_rank=0, local_batch_size=local_batch_size * dp_world_size, **kwargs
        )
        self._rows = slice(dp_rank * local_batch_size, (dp_rank + 1) * local_batch_size)
        self._ignore_every = config.ignore_every

    def __iter__(self):
        for inputs, labels in super().__iter__():
            if self._ignore_every:
                first_half = torch.arange(labels.shape[1]) < labels.shape[1] // 2
                ignored = (labels % self._ignore_every == 0) | (labels[:, :1] % 2 == 0) & first_half
                labels = labels.masked_fill(ignored, -100)
            yield {name: value[self._rows] for name, value in inputs.items()}, labels[self._rows]
