"""A deep student out of a shallow one's checkpoint, as torchtitan writes it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.bench.converge.stacking import main, shallow_name, shorten, stack
from let_plugin.config.errors import ConfigError


def weights(depth, width=3):
    """Each tensor is filled with a number of its own."""
    names = ["tok_embeddings.weight", *(f"layers.{i}.ffn.w1.weight" for i in range(depth)), "norm.weight"]
    return {name: torch.full((width,), float(i)) for i, name in enumerate(names)}


def shapes(depth, width=3):
    return {name: tensor.shape for name, tensor in weights(depth, width).items()}


@pytest.fixture
def shallow(tmp_path):
    folder = str(tmp_path / "step-10")
    dcp.save({**weights(2), "optimizer.lr": torch.ones(1)}, checkpoint_id=folder, no_dist=True)
    return folder


def test_the_blocks_are_stacked_and_the_rest_is_kept(shallow):
    stacked = stack(shapes(6), shallow)
    assert {name: tensor[0].item() for name, tensor in stacked.items()} == {
        "tok_embeddings.weight": 0,
        **{f"layers.{i}.ffn.w1.weight": 1 + i % 2 for i in range(6)},
        "norm.weight": 3,
    }


@given(depth=st.integers(1, 12), copies=st.integers(1, 4))
def test_every_shallow_block_is_used_equally_often(depth, copies):
    names = [shallow_name(f"layers.{i}.w", depth) for i in range(depth * copies)]
    assert all(names.count(f"layers.{i}.w") == copies for i in range(depth))
    assert shallow_name("lm_head.layers.9.w", depth) == "lm_head.layers.9.w"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (shapes(5), "has 2 blocks; the student's depth, 5, must be a multiple of it"),
        (shapes(2), "the student's depth, 2, must be"),
        (
            shapes(4, width=7),
            r"layers.1.ffn.w1.weight has the shape \(3,\); the student's layers.3.ffn.w1.weight has \(7,\)",
        ),
        (shapes(4) | {"bias": torch.Size([1])}, "bias is not there"),
    ],
)
def test_what_does_not_fit_is_refused(shallow, wanted, message):
    with pytest.raises(ConfigError, match=message):
        stack(wanted, shallow)


def test_a_student_is_made_from_its_toml_file(tmp_path, tiny_config, capsys):
    from let_plugin.bench.converge.stacking import _shapes
    from let_plugin.config import load as toml_config

    deep = _shapes(toml_config.load(tiny_config, []).config)
    shallow = {
        name: torch.randn(shape) for name, shape in deep.items() if "layers.2." not in name and "layers.3." not in name
    }
    dcp.save(shallow, checkpoint_id=str(tmp_path / "shallow"), no_dist=True)
    arguments = [str(tiny_config), str(tmp_path / "shallow"), str(tmp_path / "deep")]
    assert main(arguments) == 0
    got = {name: torch.empty(shape) for name, shape in deep.items()}
    dcp.load(got, checkpoint_id=str(tmp_path / "deep"), no_dist=True)
    for name, tensor in got.items():
        assert torch.equal(tensor, shallow[shallow_name(name, 2)])
    assert main(arguments) == 2 and "OUT" in capsys.readouterr().err
    assert main([str(tiny_config), str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2


def test_the_shallow_student_has_the_first_blocks(config):
    spec = config.model_spec
    shorten(config, 2)
    assert len(config.model_spec.model.layers) == 2 and len(spec.model.layers) == 4  # others may hold that one
    for num_blocks in (0, 2, 3):
        with pytest.raises(ConfigError, match="--gstack-blocks"):
            shorten(config, num_blocks)
