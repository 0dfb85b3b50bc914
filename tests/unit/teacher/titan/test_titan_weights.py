"""What is wrong with the files of a torchtitan teacher is said when it is opened, with the tensors' names."""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER
from let_plugin.preflight import checks as preflight
from tests.support.hf_models import FILE, config_with, content, opened, weights
from tests.support.problems import problem_of


def message_of(path, spec="tiny_teacher"):
    """What opening the teacher complains about."""
    problem = problem_of(opened, path, spec=spec)
    assert (problem.key, problem.value) == ("let.teacher.path", str(path))
    return problem.message


@pytest.fixture
def safetensors(tmp_path):
    """A copy of the demo's teacher, to damage."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


def cut(file, num_bytes):
    file.write_bytes(file.read_bytes()[:num_bytes])


SAFETENSORS = [  # mistake, part of the error
    (shutil.rmtree, "no such folder with a torchtitan checkpoint (DCP) or *.safetensors"),
    (lambda f: cut(f / FILE, -2_000_000), f"{FILE} is truncated or not a safetensors file"),
    (content(b"[", "config.json"), "config.json cannot be read"),
    # It would load, as another model: the blocks below the missing ones, and a norm that never saw their output.
    (
        weights(lambda w: w | {"model.layers.4.mlp.up_proj.weight": w["model.layers.1.mlp.up_proj.weight"].clone()}),
        "the checkpoint has 5 blocks, the spec 4",
    ),
]


@pytest.mark.parametrize(("damage", "message"), SAFETENSORS)
def test_what_is_wrong_with_safetensors_is_said(safetensors, damage, message):
    damage(safetensors)
    assert message in message_of(safetensors, "demo_teacher")


def test_a_config_json_of_another_model(safetensors):
    config_with(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})(safetensors)
    problem = problem_of(opened, safetensors, spec="demo_teacher")
    assert (problem.key, problem.value) == ("let.teacher.spec", "demo_teacher")
    assert "rope_theta = 500000.0, the spec 10000.0" in problem.message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: cut(file, 5000), "and 12 more; fetch"),
        (lambda file: file.unlink(), "__0_0.distcp is missing"),
        (lambda file: cut(file.parent / ".metadata", 1), ".metadata is not one that torch has written, or is damaged"),
    ],
)
def test_files_of_a_torchtitan_checkpoint_that_are_not_wholly_there(tiny_teacher, tmp_path, damage, message):
    folder = shutil.copytree(tiny_teacher[0], tmp_path / "teacher")
    damage(*folder.glob("*.distcp"))
    assert message in message_of(folder)


def test_what_is_left_over_or_has_another_name_is_no_mistake(tiny_teacher, tmp_path, safetensors):
    extra = {"lm_head.weight": torch.ones(4096, 32), "optimizer.state.norm.weight.exp_avg": torch.ones(32), "step": 3}
    dcp.save({**tiny_teacher[1], **extra}, checkpoint_id=str(tmp_path / "training"), no_dist=True)
    opened(tmp_path / "training", spec="tiny_teacher")
    # Rotary frequencies follow from the configuration.
    weights(lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})(safetensors)
    tensors = load_file(safetensors / FILE)
    (safetensors / FILE).unlink()
    for i in range(2):
        save_file(dict(list(tensors.items())[i::2]), safetensors / f"part-{i}.safetensors")
    opened(safetensors, spec="demo_teacher")


def test_all_that_is_wrong_is_said_at_once_and_by_the_preflight_check(tiny_teacher, tmp_path, config):
    """`let-train --check` ends here: before anything is built."""
    tensors = {k: v for k, v in tiny_teacher[1].items() if k != "norm.weight"}
    tensors |= {"layers.0.attention_norm.weight": torch.ones(31), "layers.1.attention.wo.bias": torch.ones(32)}
    tensors |= {
        "layers.0.feed_forward.w2.weight": torch.zeros(32, 64, dtype=torch.int32),
        "layers.1.feed_forward.w2.weight": "no tensor",
    }
    dcp.save(tensors, checkpoint_id=str(tmp_path / "teacher"), no_dist=True)
    (file,) = (tmp_path / "teacher").glob("*.distcp")
    cut(file, 5000)
    config.let.teacher.path = str(tmp_path / "teacher")
    with pytest.raises(ConfigError) as info:
        preflight.run(config)
    lacking, misshapen, surplus, truncated = (problem.message for problem in info.value.problems)
    assert "lacks tensors that the spec asks for: layers.1.feed_forward.w2.weight, norm.weight" in lacking
    assert "layers.0.feed_forward.w2.weight (file integers, spec floating-point numbers)" in misshapen
    assert "layers.0.attention_norm.weight (file (31,), spec (32,))" in misshapen
    assert "layers.1.attention.wo.bias" in surplus
    assert "(__0_0.distcp is truncated)" in truncated
