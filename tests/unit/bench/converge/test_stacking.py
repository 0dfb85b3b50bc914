"""A deep student out of a shallow one's checkpoint, as torchtitan writes it."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp

from let_plugin.bench.converge.stacking import grow, shorten
from let_plugin.bench.export_hf import parameter_shapes
from let_plugin.config.errors import ConfigError


def test_a_student_grows_out_of_a_shallow_one(config, tmp_path):
    deep, spec = parameter_shapes(config.model_spec.model), config.model_spec
    shorter = copy.copy(config)
    shorten(shorter, 2)
    assert len(spec.model.layers) == 4  # others may hold that one
    shallow = {name: torch.randn(shape) for name, shape in parameter_shapes(shorter.model_spec.model).items()}
    dcp.save({**shallow, "optimizer.lr": torch.ones(1)}, checkpoint_id=str(tmp_path / "shallow"), no_dist=True)
    grow(config, 2, str(tmp_path / "shallow"), tmp_path / "deep")
    got = {name: torch.empty(shape) for name, shape in deep.items()}
    dcp.load(got, checkpoint_id=str(tmp_path / "deep"), no_dist=True)
    for name, tensor in got.items():
        assert torch.equal(tensor, shallow[name.replace("layers.2.", "layers.0.").replace("layers.3.", "layers.1.")])
    with pytest.raises(ConfigError, match=r"layers.2.\S+ is missing"):
        grow(config, 4, str(tmp_path / "shallow"), tmp_path / "other")
