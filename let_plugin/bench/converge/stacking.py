"""Model growth, a baseline that LET is compared with: a deep student starts as copies of a shallow one's blocks.

Block i of the deep model is block i modulo the shallow depth of the other: the whole stack on top of itself (G_stack,
arXiv 2405.15319, there with 4 copies). Embedding, final norm and head are taken as they are. The steps that the shallow
model was trained for are part of the cost.
"""

import copy
import dataclasses
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torchtitan.trainer import Trainer

from let_plugin.bench import export_hf
from let_plugin.config.errors import ConfigError, Problem

_BLOCK = re.compile(r"^layers\.(\d+)\.")


def grow(config: Trainer.Config, depth: int, checkpoint: str, out: Path) -> None:
    """Writes the initial weights of the student that `config` trains into the new folder `out`.

    `checkpoint` (DCP) is that of a shallow model of `depth` blocks. ConfigError if it has another depth or width.
    """
    assert config.model_spec is not None
    model: Any = config.model_spec.model
    model.update_from_config(config=config)
    shallow_name = partial(_BLOCK.sub, lambda match: f"layers.{int(match[1]) % depth}.")
    weights = export_hf.read_checkpoint(checkpoint, export_hf.parameter_shapes(model), source=shallow_name)
    dcp.save(weights, checkpoint_id=os.fspath(out), no_dist=True)


def shorten(config: Trainer.Config, num_blocks: int) -> None:
    """Keeps the student's first `num_blocks` blocks, in place. ConfigError if its depth is not a multiple of it."""
    spec = config.model_spec
    assert spec is not None
    model: Any = copy.deepcopy(spec.model)
    depth = len(model.layers)
    if not 0 < num_blocks < depth or depth % num_blocks:
        raise ConfigError(Problem("--gstack-blocks", f"the student's depth, {depth}, must be a multiple", num_blocks))
    model.layers = model.layers[:num_blocks]
    config.model_spec = dataclasses.replace(spec, model=model)
