"""Which kind of teacher a `[let.teacher]` table means, and what gives a run its states."""

import sys

from let_plugin.demo import TEACHER
from let_plugin.demo import config_registry as config_registry  # registers the demo's teacher
from let_plugin.teacher import open as teacher_open
from let_plugin.teacher.titan import source as titan
from tests.support.hf_models import opened
from tests.support.problems import problem_of


def test_a_spec_is_torchtitans_with_its_own_path_or_another_and_needs_no_optional_dependency(monkeypatch):
    for name in ("transformers", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    source = opened(spec="demo_teacher")
    assert isinstance(source, titan.TitanTeacherSource) and source.info.hidden_size == 128
    assert source.info.description.endswith(f"safetensors from {TEACHER}")
    problem = problem_of(opened, "/absent", spec="demo_teacher")
    assert (problem.key, problem.value) == ("let.teacher.path", "/absent")
    for module in (teacher_open, titan):
        assert not {"transformers", "gguf"} & set(vars(module))  # nor was it imported before
