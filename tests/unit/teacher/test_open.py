"""Which kind of teacher a `[let.teacher]` table means, and what gives a run its states."""

import sys

import pytest
import torch

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER
from let_plugin.teacher.base import OnlineStates, TeacherSource
from let_plugin.teacher.open import make_provider, open_source, open_teacher
from let_plugin.teacher.stored.features import Features, StoredStates
from tests.support import exports


def problem_of(**fields):
    with pytest.raises(ConfigError) as info:
        open_teacher(TeacherConfig(**fields))
    return info.value.problems[0]


def test_no_teacher():
    problem = problem_of()
    assert (problem.key, problem.value) == ("let.teacher.path", "")
    assert "a folder in Hugging Face format, a hub name or a .gguf file" in problem.message


def test_a_spec_is_torchtitans_with_its_own_path_or_another():
    from let_plugin.demo import config_registry  # noqa: F401  registers it
    from let_plugin.teacher.titan.source import TitanTeacherSource

    source = open_teacher(TeacherConfig(spec="demo_teacher"))
    assert isinstance(source, TitanTeacherSource)
    assert source.info.description.endswith(f"safetensors from {TEACHER}")
    assert problem_of(spec="demo_teacher", path="/absent").value == "/absent"


def test_a_folder_is_transformers():
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    from let_plugin.teacher.hf.source import HFTeacherSource

    assert isinstance(open_teacher(TeacherConfig(path=TEACHER, spec="transformers")), HFTeacherSource)


@pytest.mark.parametrize("name", ["model.gguf", "sha256-0123"])  # ollama's files have no ending
def test_a_file_is_gguf(tmp_path, name):
    pytest.importorskip("gguf", reason="pip install let-plugin[hf]")
    path = tmp_path / name
    path.write_bytes(b"GGUF, or so it says")
    problem = problem_of(path=str(path))
    assert (problem.key, problem.value) == ("let.teacher.path", str(path))
    assert "truncated (19 bytes)" in problem.message


def test_a_gguf_file_that_is_not_there(tmp_path):
    problem = problem_of(path=str(tmp_path / "absent.gguf"))
    assert problem.key == "let.teacher.path"


def test_a_safetensors_file_is_told_from_its_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    problem = problem_of(path=str(path))
    assert problem.key == "let.teacher.path" and "folder" in problem.message


def test_torchtitans_teachers_need_no_optional_dependency(monkeypatch):
    from let_plugin.demo import config_registry  # noqa: F401  registers it
    from let_plugin.teacher import open as teacher_open
    from let_plugin.teacher.titan import source as titan

    for name in ("transformers", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert open_teacher(TeacherConfig(spec="demo_teacher")).info.hidden_size == 128
    for module in (teacher_open, titan):
        assert not {"transformers", "gguf"} & set(vars(module))  # nor was it imported before


def test_stored_states_take_the_teachers_place_where_they_are_named(config, parallel_dims, tmp_path):
    def provider():
        source = open_source(config.let.teacher)
        made = make_provider(
            source,
            config=config,
            student_tokenizer=None,
            device=torch.device("cpu"),
            parallel_dims=parallel_dims,
            layers=[1],
        )
        return source, made

    source, made = provider()
    assert isinstance(source, TeacherSource) and isinstance(made, OnlineStates)
    exports.run(config, "--out", tmp_path / "features")
    config.let.teacher.features = str(tmp_path / "features")  # the teacher is named, too
    stored, made = provider()
    assert isinstance(stored, Features) and isinstance(made, StoredStates) and made.teacher is None
    assert stored.info == source.info
    config.let.teacher = TeacherConfig(features=config.let.teacher.features)
    assert isinstance(provider()[1], StoredStates)
