"""torchtitan teachers against plain PyTorch and transformers; and every mistake that their source has to report.

Shape legend: B batch, L sequence, E teacher width.
"""

import dataclasses
import functools
import importlib
import shutil
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.config import CompileConfig
from torchtitan.models.common.attention import ScaledDotProductAttention, VarlenAttention

from let_plugin.alignment.layer_mapping import EMBEDDING
from let_plugin.demo import TEACHER
from let_plugin.runtime import host
from let_plugin.teacher.titan import source as titan
from tests.support import config_registry as tiny
from tests.support import hf_models, reference
from tests.support.hf_models import opened, packed_batch
from tests.support.problems import problem_of

tiny_source = functools.partial(opened, spec="tiny_teacher")


def relative_difference(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("layers", "final_norm", "num_blocks", "compiled"),
    [([EMBEDDING], True, 1, False), ([1], False, 2, False), ([1], True, 2, True), ([1, EMBEDDING, 0], True, 2, True)],
)
@torch.no_grad()
def test_states_of_any_layers_equal_the_plain_reference(
    tiny_teacher, build, config, layers, final_norm, num_blocks, compiled
):
    path, weights = tiny_teacher
    config.compile = CompileConfig(enable=compiled, components=["model"], backend="aot_eager")
    source = tiny_source(path)
    teacher = build(source, layers=layers, final_norm=final_norm)
    batch = packed_batch(tiny.VOCAB_SIZE)
    hidden, final_BLE = reference.llama(weights, *batch, **tiny.TEACHER)
    by_layer = {EMBEDDING: weights["tok_embeddings.weight"][batch[0]], **dict(enumerate(hidden)), "final": final_BLE}
    expected_BLE = torch.cat([by_layer["final" if layer == 1 and final_norm else layer] for layer in layers], -1)
    for _ in range(2):  # compiled in the first
        states_BLE = teacher(*batch)
        assert type(states_BLE) is torch.Tensor and relative_difference(states_BLE, expected_BLE) <= 1e-6
    assert len(teacher.model.layers) == num_blocks
    has_norm = final_norm and 1 in layers
    assert (teacher.model.norm is not None) == has_norm
    info = source.info
    num_params = sum(p.numel() for p in teacher.parameters()) + (0 if has_norm else tiny.TEACHER_DIM)
    assert num_params == info.num_params_to(layers) == info.num_trunk_params - sum(info.block_params[num_blocks:])
    assert states_BLE.shape[-1] == sum(info.width(layer, final_norm) for layer in layers)


def masks_of(model_config, positions_BL):
    with torch.device("meta"):
        model = model_config.build()
    return model.get_attention_masks(positions=positions_BL)


@torch.no_grad()
def test_the_student_s_masks_serve_for_both_where_they_are_the_same(tiny_teacher, build, config):
    path, _ = tiny_teacher
    host.adapt_model_spec(config.model_spec)
    source = tiny_source(path)
    teacher = build(source)
    tokens_BL, positions_BL = packed_batch(tiny.VOCAB_SIZE)
    student_masks = masks_of(config.model_spec.model, positions_BL)
    expected_BLE = teacher(tokens_BL, positions_BL)
    assert torch.equal(teacher(tokens_BL, positions_BL, student_masks), expected_BLE)
    # They are what is used: without boundaries between the documents, the states are others.
    of_one_document = masks_of(config.model_spec.model, torch.arange(24).expand(2, 24))
    assert relative_difference(teacher(tokens_BL, positions_BL, of_one_document), expected_BLE) > 0.1

    # A student with masks of its own keeps them for itself.
    block_size = dataclasses.replace(config.model_spec.model.first_attention.inner_attention, block_size=64)
    for inner_attention in (block_size, VarlenAttention.Config(), ScaledDotProductAttention.Config()):
        for layer in config.model_spec.model.layers:
            layer.attention.inner_attention = inner_attention
        assert torch.equal(build(source)(tokens_BL, positions_BL, of_one_document), expected_BLE)
    for model in ("gpt_oss", "muse_glimmer"):
        config.model_spec = importlib.import_module(f"torchtitan.models.{model}").model_registry("debugmodel")
        assert torch.equal(build(source)(tokens_BL, positions_BL, object()), expected_BLE)


@torch.no_grad()
def test_weights_that_are_not_finite_are_named_and_blocks_behind_the_layers_not_read(tiny_teacher, tmp_path, build):
    weights = {name: weight.clone() for name, weight in tiny_teacher[1].items()}
    weights["layers.1.attention.wo.weight"][3, 5] = torch.inf
    weights["norm.weight"][3] = torch.nan
    dcp.save(weights, checkpoint_id=str(tmp_path), no_dist=True)
    source = tiny_source(tmp_path)
    problem = problem_of(build, source)
    assert problem.key == "let.teacher.path"
    assert "NaN or infinite values: layers.1.attention.wo.weight, norm.weight" in problem.message
    batch = packed_batch(tiny.VOCAB_SIZE)
    assert torch.equal(build(source, layers=[0])(*batch), build(tiny_source(tiny_teacher[0]), layers=[0])(*batch))
    folder, name = shutil.copytree(TEACHER, tmp_path / "safetensors"), "model.layers.1.self_attn.q_proj.weight"
    hf_models.weights(lambda tensors: tensors | {name: torch.full_like(tensors[name], torch.nan)})(folder)
    problem = problem_of(build, opened(folder, spec="demo_teacher"))
    assert "NaN or infinite values: layers.1.attention.qkv_linear.wq.weight" in problem.message  # as in torchtitan


@pytest.mark.parametrize("spec", ["tiny_teacher", "demo_teacher"])
def test_a_built_teacher_is_frozen_and_headless_and_nothing_else_is_changed(tiny_teacher, build, config, spec):
    rng_state, before, dtype = torch.get_rng_state(), repr(config), torch.bfloat16
    teacher = build(opened(tiny_teacher[0] if spec == "tiny_teacher" else "", spec=spec), dtype)
    assert torch.equal(torch.get_rng_state(), rng_state) and torch.get_default_dtype() == torch.float32
    assert repr(config) == before
    assert all(p.dtype == dtype and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training or "lm_head" in name for name, module in teacher.named_modules())
    assert not teacher(*packed_batch(tiny.VOCAB_SIZE)).requires_grad


@pytest.mark.parametrize(
    ("spec", "suggestion"),
    [
        ("tiny_teachr", "did you mean 'tiny_teacher'?"),
        ("llama3:1b", "'1B'"),
        ("llama3:", "valid names: 1B"),
        ("deepseek_v3:nope", "no such flavor"),
        ("flux:flux-debug", "is no decoder"),
        ("lama3:1B", "'llama3'"),
    ],
)
def test_a_bad_spec_model_or_flavor_suggests(tiny_teacher, spec, suggestion):
    problem = problem_of(opened, tiny_teacher[0], spec=spec)
    assert (problem.key, problem.value) == ("let.teacher.spec", spec)
    assert suggestion in problem.message


def test_a_spec_brings_its_own_path_and_needs_no_optional_dependency(monkeypatch):
    for name in ("transformers", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    source = opened(spec="demo_teacher")
    assert isinstance(source, titan.TitanTeacherSource) and source.info.hidden_size == 128
    assert source.info.description.endswith(f"safetensors from {TEACHER}")
