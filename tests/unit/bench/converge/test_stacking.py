"""A deep student out of a shallow one's checkpoint, as torchtitan writes it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.bench.converge.stacking import grow, shallow_name, shorten
from let_plugin.bench.export_hf import parameter_shapes
from let_plugin.config.errors import ConfigError


@given(depth=st.integers(1, 12), copies=st.integers(1, 4))
def test_every_shallow_block_is_used_equally_often(depth, copies):
    names = [shallow_name(f"layers.{i}.w", depth) for i in range(depth * copies)]
    assert all(names.count(f"layers.{i}.w") == copies for i in range(depth))
    assert shallow_name("lm_head.layers.9.w", depth) == "lm_head.layers.9.w"


def test_a_student_grows_out_of_a_shallow_one(config, tmp_path):
    deep = parameter_shapes(config.model_spec.model)
    shallow = {name: torch.randn(shape) for name, shape in deep.items() if shallow_name(name, 2) == name}
    dcp.save({**shallow, "optimizer.lr": torch.ones(1)}, checkpoint_id=str(tmp_path / "shallow"), no_dist=True)
    grow(config, 2, str(tmp_path / "shallow"), tmp_path / "deep")
    got = {name: torch.empty(shape) for name, shape in deep.items()}
    dcp.load(got, checkpoint_id=str(tmp_path / "deep"), no_dist=True)
    for name, tensor in got.items():
        assert torch.equal(tensor, shallow[shallow_name(name, 2)])
    with pytest.raises(ConfigError, match=r"layers.2.\S+ is not in it"):
        grow(config, 4, str(tmp_path / "shallow"), tmp_path / "other")
    with pytest.raises(ConfigError, match="not a checkpoint of torchtitan"):
        grow(config, 2, str(tmp_path / "nowhere"), tmp_path / "other")
    shallow["norm.weight"] = torch.ones(7)
    dcp.save(shallow, checkpoint_id=str(tmp_path / "wide"), no_dist=True)
    with pytest.raises(ConfigError, match=r"norm.weight has the shape \(7,\) in it; norm.weight of .* \(48,\)"):
        grow(config, 2, str(tmp_path / "wide"), tmp_path / "other")


def test_the_shallow_student_has_the_first_blocks(config):
    spec = config.model_spec
    shorten(config, 2)
    assert len(config.model_spec.model.layers) == 2 and len(spec.model.layers) == 4  # others may hold that one
    for num_blocks in (0, 2, 3):
        with pytest.raises(ConfigError, match="--gstack-blocks"):
            shorten(config, num_blocks)
