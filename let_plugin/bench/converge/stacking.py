"""Model growth, a baseline that LET is compared with: a deep student starts as copies of a shallow one's blocks.

`python -m let_plugin.bench.converge.stacking CONFIG.toml CHECKPOINT OUT` makes the initial weights of the student that
CONFIG.toml trains out of a checkpoint of a model that is like it, but has fewer blocks. Block i of the deep one is
block i modulo the shallow depth of the other: the whole stack on top of itself (G_stack, arXiv 2405.15319, there with
4 copies); embedding, final norm and head are taken as they are. A run starts from the result by

    [checkpoint]
    enable = true
    initial_load_path = "OUT"

The steps that the shallow model was trained for are part of the cost.
"""

import argparse
import copy
import dataclasses
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp

from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import dcp_files

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

_BLOCK = re.compile(r"^layers\.(\d+)\.")


def shallow_name(name: str, depth: int) -> str:
    """Which tensor of a model of `depth` blocks becomes the tensor `name` of the deeper one."""
    return _BLOCK.sub(lambda match: f"layers.{int(match[1]) % depth}.", name)


def stack(shapes: dict[str, torch.Size], checkpoint: str) -> dict[str, torch.Tensor]:
    """The deep model's weights, name -> tensor in the checkpoint's dtype.

    Args:
        shapes: The deep model's parameters.
        checkpoint: Folder of a torchtitan checkpoint (DCP) of the shallow model. What else is in it is left out.

    Raises:
        ConfigError: If it cannot be read, or is not of a shallower model of the same widths whose depth divides.
    """
    try:
        reader = dcp_files.open_checkpoint(checkpoint)
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:  # a missing folder, a damaged file: DCP has many ways to say so
        raise ConfigError(Problem("CHECKPOINT", f"not a checkpoint of torchtitan: {error}", checkpoint)) from error

    def depth_of(names: Any) -> int:
        return max((int(match[1]) + 1 for name in names if (match := _BLOCK.match(name))), default=0)

    depth, deep = depth_of(metadata), depth_of(shapes)
    if not 0 < depth < deep or deep % depth:
        message = f"its model has {depth} blocks; the student's depth, {deep}, must be a multiple of it"
        raise ConfigError(Problem("CHECKPOINT", message, checkpoint))
    sources = {name: shallow_name(name, depth) for name in shapes}
    problems = []
    for name, source in sources.items():
        size = getattr(metadata.get(source), "size", None)
        if size != shapes[name]:
            found = "is not there" if size is None else f"has the shape {tuple(size)}"
            message = f"{source} {found}; the student's {name} has {tuple(shapes[name])}"
            problems.append(Problem("CHECKPOINT", message, checkpoint))
    if problems:
        raise ConfigError(problems)
    tensors: dict[str, Any] = {name: metadata[name] for name in sources.values()}
    weights = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in tensors.items()}
    dcp_files.load(weights, reader)
    return {name: weights[source] for name, source in sources.items()}


def grow(config: "Trainer.Config", checkpoint: str, out: Path) -> int:
    """Writes the initial weights of the student that `config` trains into the new folder `out`.

    Returns:
        How many parameters they are.

    Raises:
        ConfigError: As `stack`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this process is no job: it is not meant to be one
        weights = stack(_shapes(config), checkpoint)
        dcp.save(weights, checkpoint_id=os.fspath(out), no_dist=True)
    return sum(weight.numel() for weight in weights.values())


def shorten(config: "Trainer.Config", num_blocks: int) -> None:
    """Makes the student the shallow one that grows: its first `num_blocks` blocks, in place.

    ConfigError if that is not a part of its depth that can be stacked to all of it.
    """
    spec = config.model_spec
    assert spec is not None
    blocks = getattr(spec.model, "layers", None)
    if not isinstance(blocks, list):
        raise ConfigError(Problem("model_spec", f"{spec.name} does not list its blocks: it cannot be made shallower"))
    if not 0 < num_blocks < len(blocks) or len(blocks) % num_blocks:
        message = f"the student's depth, {len(blocks)}, must be a multiple of it"
        raise ConfigError(Problem("--gstack-blocks", message, num_blocks))
    model = copy.deepcopy(spec.model)
    model.layers = model.layers[:num_blocks]
    config.model_spec = dataclasses.replace(spec, model=model)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m let_plugin.bench.converge.stacking", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="trains the deep student")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder of the shallow model's checkpoint (.../step-N)"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the deep student's initial weights")
    args, overrides = parser.parse_known_args(argv)

    from let_plugin.config import load as toml_config
    from let_plugin.runtime import host

    try:
        if args.out.exists():
            raise ConfigError(Problem("OUT", "is there already; give a new folder", str(args.out)))
        host.set_up("cpu")
        num_params = grow(toml_config.load(args.config, overrides).config, args.checkpoint, args.out)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {num_params:,} parameters")
    return 0


def _shapes(config: Any) -> dict[str, torch.Size]:
    model_config = config.model_spec.model
    model_config.update_from_config(config=config)
    with torch.device("meta"):
        model = model_config.build()
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    sys.exit(main())
