"""What is wrong with the files of a torchtitan teacher is said when it is opened, with the tensors' names."""

import dataclasses
import shutil
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER
from let_plugin.preflight import checks as preflight
from let_plugin.teacher.titan.source import TEACHER_SPECS, TitanTeacherSource
from let_plugin.teacher.titan.weights import TitanWeights

FILE = "model.safetensors"


def problem_of(path, spec="tiny_teacher", key="let.teacher.path"):
    """What opening the teacher complains about."""
    with pytest.raises(ConfigError) as info:
        TitanTeacherSource(TeacherConfig(spec=spec, path=str(path)))
    (problem,) = info.value.problems
    assert (problem.key, problem.value) == (key, str(path) if key == "let.teacher.path" else spec)
    assert "Traceback" not in problem.message and "\n" not in problem.message
    return problem.message


@pytest.fixture
def safetensors(tmp_path):
    """A copy of the demo's teacher, to damage."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


def cut(file, num_bytes):
    file.write_bytes(file.read_bytes()[:num_bytes])


def edited(edit):
    return lambda folder: save_file(edit(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})


def replaced(old, new):
    def edit(folder):
        file = folder / "config.json"
        file.write_text(file.read_text().replace(old, new))

    return edit


def parts(folder, index=None):
    """The weights in two files of other names; with an index, if it is given."""
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    for i in range(2):
        save_file(dict(list(weights.items())[i::2]), folder / f"part-{i}.safetensors")
    if index:
        (folder / f"{FILE}.index.json").write_text(index)


UP = "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"
INDEX = '{"weight_map": {"model.norm.weight": "part-2.safetensors"}}'
SAFETENSORS = [  # mistake, part of the error
    (shutil.rmtree, "no such folder with a torchtitan checkpoint (DCP) or *.safetensors"),
    (lambda f: (f / FILE).rename(f / "pytorch_model.bin"), "no such folder with a torchtitan checkpoint"),
    (lambda f: cut(f / FILE, -2_000_000), f"{FILE} is truncated or not a safetensors file"),
    (lambda f: cut(f / FILE, 0), f"{FILE} is truncated or not a safetensors file"),
    (lambda f: parts(f, INDEX), "not there: part-2.safetensors; fetch them. The folder has part-0.safetensors, part-1"),
    (replaced("{", "["), "config.json cannot be read"),
    (edited(lambda w: {k: v for k, v in w.items() if k != UP}), f"lacks tensors that the spec asks for: {UP}"),
    (edited(lambda w: w | {UP: torch.zeros(128, 352)}), f"{UP} (file (128, 352), spec (352, 128))"),
    # It would load, as another model: the blocks below the missing ones, and a norm that never saw their output.
    (
        edited(lambda w: w | {"model.layers.4.mlp.up_proj.weight": w[UP].clone()}),
        "the checkpoint has 5 blocks, the spec 4",
    ),
    (edited(lambda w: w | {BIAS: torch.ones(128)}), f"tensors that the spec knows nothing of: {BIAS}"),
]


@pytest.mark.parametrize(("damage", "message"), SAFETENSORS)
def test_what_is_wrong_with_safetensors_is_said(safetensors, damage, message):
    damage(safetensors)
    assert message in problem_of(safetensors, "demo_teacher")


def test_no_weights_or_a_config_json_of_another_model(safetensors):
    assert "no such folder" in problem_of("")
    replaced("10000.0", "500000.0")(safetensors)
    message = problem_of(safetensors, "demo_teacher", key="let.teacher.spec")
    assert "rope_theta = 500000.0, the spec 10000.0" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: cut(file, -500), "tensors that are not wholly there: layers."),
        (lambda file: cut(file, 5000), "and 12 more; fetch"),
        (lambda file: file.unlink(), "__0_0.distcp is missing"),
        (lambda file: cut(file.parent / ".metadata", 1), ".metadata is not one that torch has written, or is damaged"),
    ],
)
def test_files_of_a_torchtitan_checkpoint_that_are_not_wholly_there(tiny_teacher, tmp_path, damage, message):
    folder = shutil.copytree(tiny_teacher[0], tmp_path / "teacher")
    (file,) = folder.glob("*.distcp")
    damage(file)
    assert message in problem_of(folder)


# Tensors

W2 = "layers.1.feed_forward.w2.weight"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, f"lacks tensors that the spec asks for: {W2}"),
        ({W2: "no tensor"}, f"lacks tensors that the spec asks for: {W2}"),
        ({W2: torch.zeros(32, 72)}, f"{W2} (file (32, 72), spec (32, 64))"),
        ({W2: torch.zeros(32, 64, dtype=torch.int32)}, f"{W2} (file integers, spec floating-point numbers)"),
    ],
)
def test_missing_or_misshapen_weights_of_a_torchtitan_checkpoint_are_named(tiny_teacher, tmp_path, wrong, message):
    weights = {k: v for k, v in tiny_teacher[1].items() if k != W2}
    dcp.save(weights | wrong, checkpoint_id=str(tmp_path), no_dist=True)
    assert message in problem_of(tmp_path)


def test_what_is_left_over_or_has_another_name_is_no_mistake(tiny_teacher, tmp_path, safetensors):
    extra = {"lm_head.weight": torch.ones(4096, 32), "optimizer.state.norm.weight.exp_avg": torch.ones(32), "step": 3}
    dcp.save({**tiny_teacher[1], **extra}, checkpoint_id=str(tmp_path / "training"), no_dist=True)
    TitanTeacherSource(TeacherConfig(spec="tiny_teacher", path=str(tmp_path / "training")))
    # Rotary frequencies follow from the configuration.
    edited(lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})(safetensors)
    parts(safetensors)
    TitanTeacherSource(TeacherConfig(spec="demo_teacher", path=str(safetensors)))


def test_all_that_is_wrong_is_said_at_once_and_by_the_preflight_check(tiny_teacher, tmp_path, config):
    """`let-train --check` ends here: before anything is built."""
    weights = {k: v for k, v in tiny_teacher[1].items() if k != "norm.weight"}
    weights |= {"layers.0.attention_norm.weight": torch.ones(31), "layers.1.attention.wo.bias": torch.ones(32)}
    dcp.save(weights, checkpoint_id=str(tmp_path / "teacher"), no_dist=True)
    (file,) = (tmp_path / "teacher").glob("*.distcp")
    cut(file, 5000)
    config.let.teacher.path = str(tmp_path / "teacher")
    with pytest.raises(ConfigError) as info:
        preflight.run(config)
    lacking, misshapen, surplus, truncated = (problem.message for problem in info.value.problems)
    assert "norm.weight" in lacking
    assert "layers.0.attention_norm.weight (file (31,), spec (32,))" in misshapen
    assert "layers.1.attention.wo.bias" in surplus
    assert "(__0_0.distcp is truncated)" in truncated


class ForTheWholeModel(Llama3StateDictAdapter):
    """One that cannot translate a block alone, and has a reader of its own."""

    readers: ClassVar[list] = []

    def from_hf(self, hf_state_dict):
        assert "model.embed_tokens.weight" in hf_state_dict
        return super().from_hf(hf_state_dict)

    def get_hf_storage_reader(self, path, from_quantized=False):
        self.readers.append(HuggingFaceStorageReader(path))
        return self.readers[-1]


def test_an_adapter_that_needs_the_whole_model_and_its_own_reader_gets_them(safetensors):
    states = []
    spec = TEACHER_SPECS.get("demo_teacher").make_spec()
    for adapter in (Llama3StateDictAdapter, ForTheWholeModel):
        model = spec.model.build()
        model.lm_head = None  # the file has none
        TitanWeights(str(safetensors), dataclasses.replace(spec, state_dict_adapter=adapter), "").load(
            model, torch.float32
        )
        states.append(model.state_dict())
    assert len(ForTheWholeModel.readers) == 1
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
