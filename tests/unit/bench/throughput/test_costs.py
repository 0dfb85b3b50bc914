"""FLOPs of stored states: none while they are read, and those of the export before."""

import pytest

from let_plugin.bench.converge.methods import Resources
from let_plugin.bench.converge.plan import Options, Planner
from let_plugin.bench.throughput.costs import active_cost, step_flops
from let_plugin.config import TeacherConfig
from let_plugin.config.load import Loaded
from let_plugin.preflight.report import Student
from tests.support import exports
from tests.unit.preflight.test_report import STUDENT_BLOCKS, STUDENT_EMBEDDING, TEACHER_BLOCKS


def test_a_plain_step_and_an_active_one(config, parallel_dims):
    student = Student(config)
    plain = step_flops(student, 256)
    assert plain == 6 * (STUDENT_BLOCKS + STUDENT_EMBEDDING) * 256
    assert active_cost(config, student, parallel_dims).overhead * plain == pytest.approx(2 * TEACHER_BLOCKS * 256)


def test_states_that_are_stored_were_made_before(config, parallel_dims, tmp_path):
    """Of the two steps that are aligned, of 4 x 64 tokens."""
    exports.run(config, "--out", tmp_path / "features", "--encoding", "float32")
    config.let.teacher = TeacherConfig(features=str(tmp_path / "features"))
    config.validator.freq = 2
    options = Options(
        methods=["let"],
        seeds=[0],
        tuning_seeds=[1],
        weights=[],
        test_dataset="let_demo_test",
        test_path="",
        resources=Resources(),
        num_processes=1,
        out=tmp_path / "rows.jsonl",
        work=tmp_path / "work",
    )
    run = Planner(Loaded(config, "tests.support.tiny", "run.toml"), options).plan("let", 0.5, 0)
    assert run.active_flops == 0
    assert (run.preparation.what, run.preparation.tokens) == ("stored states", 512)
    assert run.preparation.flops == 2 * TEACHER_BLOCKS * 512 and run.preparation.seconds is None
