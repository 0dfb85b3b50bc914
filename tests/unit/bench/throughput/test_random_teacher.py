"""Random teachers are as large as they were asked to be."""

import pytest
import torch

from let_plugin.bench.throughput.random_teacher import RandomTeacher, of_share
from let_plugin.config import TeacherConfig
from let_plugin.preflight.report import Student
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.open import open_teacher
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny


def student(**shape):
    config = with_let(tiny())
    config.model_spec = llama_spec("student", vocab_size=4096, **shape)
    return Student(config)


@pytest.fixture(scope="module")
def students():
    return [
        student(dim=256, num_layers=6, num_heads=4, hidden_dim=768),  # the demo's
        student(dim=2048, num_layers=24, num_heads=16, hidden_dim=5632),  # 1.4B
        student(dim=4096, num_layers=32, num_heads=32, hidden_dim=11008),  # 7B
    ]


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2])
def test_shares(students, share):
    for each in students:
        teacher = of_share(each, share, 4096)
        assert teacher.num_matmul_params / each.num_matmul_params == pytest.approx(share, rel=0.05)
        assert teacher.dim % teacher.num_heads == 0 and teacher.dim // teacher.num_heads % 16 == 0
        # Shaped like the student, as far as so few parameters can be.
        aspect = (teacher.dim / teacher.num_layers) / (each.width / each.num_blocks)
        assert 0.4 < aspect < 2.5


def test_written_registered_and_found(tmp_path):
    teacher = RandomTeacher(dim=32, num_layers=3, num_heads=2, hidden_dim=80, vocab_size=64)
    path = teacher.write(tmp_path)
    state = torch.random.get_rng_state()
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert teacher.write(tmp_path) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert torch.equal(torch.random.get_rng_state(), state)
    teacher.register()
    teacher.register()
    info = open_teacher(TeacherConfig(spec=teacher.name, path=str(path))).info
    assert (info.hidden_size, info.num_layers, info.vocab_size) == (32, 3, 64)
    assert info.num_trunk_params - info.num_embedding_params == teacher.num_matmul_params
