"""The weights of a .gguf file, dequantised one tensor at a time.

What a tensor is called in the trunk, and what has to be undone of llama.cpp's layout (the order of the rows of Llama's
queries and keys, say), is asked of `transformers`. The file is mapped into memory (`gguf.GGUFReader`); a tensor is
whole while this rank's rows are taken from it, in fp32, but only one is at a time.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from let_plugin.teacher.hf.weights import Fit, Rows, Step, WholeTensor, note_missing


def fit_gguf(file: str, trunk: Any) -> Fit:
    """Matches the tensors of a .gguf file with a whole `transformers` trunk, on the meta device.

    Their shapes are compared when they are read: only then are they those of the trunk.

    Raises:
        Exception: Of any type, for a file that is truncated or damaged.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    reader = GGUFReader(file)
    config = load_gguf_checkpoint(file, return_tensors=False)["config"]
    architecture = read_field(reader, "general.architecture")[0]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(trunk, processor)
    fit = Fit()
    stored_as: dict[str, list[Any]] = {}
    for stored in reader.tensors:
        # The tensors of a mixture's experts are known without their suffix.
        name = names.get(stored.name) or names.get(stored.name.removesuffix(".weight"))
        if name is None:
            fit.unexpected.append(stored.name)
        else:
            stored_as.setdefault(name, []).append(stored)
    fit.steps = [Step([name], _Dequantisation(name, stored, processor, names)) for name, stored in stored_as.items()]
    note_missing(fit, trunk)
    return fit


def cut_tensors(file: str) -> list[str]:
    """Names, in the file, of the tensors that end behind its end; none if not even the list of tensors is there."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    size = os.path.getsize(file)
    cut = []

    class ListReader(GGUFReader):
        """Looks no further than the list of the tensors."""

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            for field in fields:
                _, _, _, shape, kind, offset = field.parts
                block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
                if start_offs + int(offset[0]) + math.prod(map(int, shape)) // block_size * block_bytes > size:
                    cut.append(field.name)

    try:
        ListReader(file)
    except Exception:  # a damaged list fails in numpy or in the reader: any type of error
        return []
    return cut


class _Dequantisation:
    """A Step's `fetch`: makes one tensor of the trunk, in fp32, from those that it is stored as.

    Args:
        name: Its name in the trunk.
        stored: The file's tensors that it is made of, as `gguf` describes them.
        processor: `transformers`' TensorProcessor of the file's architecture.
        names: Name in the file -> name in the trunk, of all tensors.
    """

    def __init__(self, name: str, stored: list[Any], processor: Any, names: Mapping[str, str]) -> None:
        self._name = name
        self._stored = stored
        self._processor = processor
        self._names = names

    def __call__(self) -> dict[str, Rows]:
        from gguf import dequantize

        collected: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for stored in self._stored:
            weights = dequantize(stored.data, stored.tensor_type)
            result = self._processor.process(
                weights=weights, name=stored.name, tensor_key_mapping=self._names, parsed_parameters=collected
            )
            if self._name not in collected["tensors"]:  # else the processor has put it there, with its other parts
                weights = np.ascontiguousarray(result.weights, dtype=np.float32)
                whole = torch.from_numpy(weights if weights.flags.writeable else weights.copy())
        return {self._name: WholeTensor(collected["tensors"].get(self._name, whole))}
