"""Which kind of teacher a `[let.teacher]` table means, and what gives a run its states."""

import sys

import pytest
import torch

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER
from let_plugin.demo import config_registry as config_registry  # registers the demo's teacher
from let_plugin.teacher import open as teacher_open
from let_plugin.teacher.base import OnlineStates, TeacherSource
from let_plugin.teacher.open import make_provider, open_source, open_teacher
from let_plugin.teacher.stored.features import Features, StoredStates
from let_plugin.teacher.titan import source as titan
from tests.support import exports


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", None, "no teacher is given; set it to a folder in Hugging Face format, a hub name or a .gguf file"),
        ("absent.gguf", None, "no such file"),
        ("model.gguf", b"GGUF, or so it says", "truncated (19 bytes)"),
        ("sha256-0123", b"GGUF, or so it says", "truncated (19 bytes)"),  # ollama's files have no ending
        ("model.safetensors", b"", "folder"),
    ],
)
def test_a_path_that_is_no_teacher(tmp_path, name, content, message):
    pytest.importorskip("gguf", reason="pip install let-plugin[hf]")
    path = name and str(tmp_path / name)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as info:
        open_teacher(TeacherConfig(path=path))
    (problem,) = info.value.problems
    assert (problem.key, problem.value) == ("let.teacher.path", path)
    assert message in problem.message


def test_a_spec_is_torchtitans_with_its_own_path_or_another_and_needs_no_optional_dependency(monkeypatch):
    for name in ("transformers", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    source = open_teacher(TeacherConfig(spec="demo_teacher"))
    assert isinstance(source, titan.TitanTeacherSource) and source.info.hidden_size == 128
    assert source.info.description.endswith(f"safetensors from {TEACHER}")
    with pytest.raises(ConfigError, match=r"let\.teacher\.path = '/absent'"):
        open_teacher(TeacherConfig(spec="demo_teacher", path="/absent"))
    for module in (teacher_open, titan):
        assert not {"transformers", "gguf"} & set(vars(module))  # nor was it imported before


def test_stored_states_take_the_teachers_place_where_they_are_named(config, parallel_dims, tmp_path):
    settings = {"config": config, "parallel_dims": parallel_dims, "device": torch.device("cpu"), "layers": [1]}

    def provider():
        source = open_source(config.let.teacher)
        return source, make_provider(source, student_tokenizer=None, **settings)

    source, made = provider()
    assert isinstance(source, TeacherSource) and isinstance(made, OnlineStates)
    exports.run(config, "--out", tmp_path / "features")
    config.let.teacher.features = str(tmp_path / "features")  # the teacher is named, too
    stored, made = provider()
    assert isinstance(stored, Features) and isinstance(made, StoredStates) and made.teacher is None
    assert stored.info == source.info
    config.let.teacher = TeacherConfig(features=config.let.teacher.features)
    assert isinstance(provider()[1], StoredStates)
