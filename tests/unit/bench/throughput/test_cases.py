"""From a command line to the runs of a round: their options, bounds, and what is refused."""

import pytest
import tomli

from let_plugin.bench.throughput import suite
from let_plugin.bench.throughput.suite import WARMUP_STEPS
from let_plugin.config import plan
from let_plugin.config.load import load
from let_plugin.preflight.report import Student
from let_plugin.runtime.models import llama_spec
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny
from tests.unit.preflight.test_report import STUDENT_BLOCKS, STUDENT_EMBEDDING, TEACHER_BLOCKS, TEACHER_EMBEDDING


@pytest.fixture
def planned(parsed):
    """Label -> run, of a command line."""

    return lambda text: {run.label: run for run in suite.plan_runs(*parsed("throughput", text))}


def test_bounds_are_those_of_the_preflight_report(planned):
    runs = planned("--steps 3 --training.steps 20")
    plain, active, stopped = (runs[name].details for name in ("plain", "active", "stopped"))
    num_student = STUDENT_BLOCKS + STUDENT_EMBEDDING
    assert active["flop_bound"] == TEACHER_BLOCKS / (3 * num_student)
    # Teacher and one activation [4, 64, 48], both in fp32.
    assert active["memory_bound_bytes"] == 4 * (TEACHER_BLOCKS + TEACHER_EMBEDDING + 4 * 64 * 48)
    assert (active["num_teacher_params"], active["num_student_params"]) == (TEACHER_BLOCKS, num_student)
    assert (active["run_steps"], active["stop_step"]) == (20, 4)  # of the user's run, not of the measured one
    for details in (plain, stopped):
        assert (details["flop_bound"], details["memory_bound_bytes"]) == (0, 0)
    assert {details["baseline"] for details in (plain, active, stopped)} == {"plain"}
    assert [runs[name].settings["is_active"] for name in ("plain", "active", "stopped")] == [False, True, False]


def test_a_run_is_what_its_line_of_let_train_says(planned, config_file):
    """Whatever the user's own settings are, nothing disturbs the measured steps."""
    own = "--let.warmup-steps 1 --let.stop-step None --let.stop-fraction 0.25 --let.adaptive-stop.criterion gradient"
    own += " --metrics.enable_tensorboard --checkpoint.enable --validator.enable --training.seq_len 32"
    runs = planned(f"--steps 4 --cases active stopped rkd control {own}")
    total, configs = WARMUP_STEPS + 4, {}
    for label, run in runs.items():
        config = configs[label] = load(config_file, run.argv[1:]).config
        assert tomli.loads(run.config)["training"]["steps"] == config.training.steps == total
        assert config.training.seq_len == 32
        assert not (config.checkpoint.enable or config.validator.enable or config.metrics.enable_tensorboard)
        assert config.metrics.log_freq > total  # no measured step is logged
    enabled = {label: config.let.enable for label, config in configs.items()}
    assert enabled == {"plain": False, "active": True, "stopped": True, "rkd": True, "control": False}
    assert configs["active"].let.stop_step == configs["rkd"].let.stop_step == total
    assert configs["stopped"].let.stop_step < WARMUP_STEPS
    assert [configs[name].let.signal for name in ("active", "rkd")] == ["states", "logits"]


def test_terms_are_all_there_in_the_measured_steps(planned, config_file):
    terms = 'terms = [{ stop_step = 4, warmup_steps = 2 }, { signal = "logits", stop_fraction = 0.1 }]'
    config_file.write_text(config_file.read_text().replace("weight = 0.5\nstop_step = 4", terms))
    configs = {label: load(config_file, run.argv[1:]).config for label, run in planned("--cases active rkd").items()}
    stops = [[plan.stop_step(configs[name], t, 1) for t in plan.terms(configs[name].let)] for name in ("active", "rkd")]
    assert stops == [[WARMUP_STEPS + 8] * 2, [WARMUP_STEPS + 8]]


def test_random_teachers_of_a_configuration_without_let(planned):
    runs = planned("--let.no-enable --teacher-share 5 20 5 --cases active control plain")
    assert list(runs) == ["plain", "active 5%", "active 20%", "control"]  # a case without a teacher is there once
    for label, share in (("active 5%", 0.05), ("active 20%", 0.2)):
        assert 3 * runs[label].details["flop_bound"] == pytest.approx(share, rel=0.05)
        assert runs[label].details["teacher_share"] == share
        assert tomli.loads(runs[label].config)["let"]["enable"]


def num_params(dim, num_layers, hidden_dim, **_):
    """Of the trunk, embeddings not counted."""
    return num_layers * (4 * dim * dim + 3 * dim * hidden_dim + 2 * dim) + dim


@pytest.mark.parametrize(
    "shape",
    [
        {"dim": 256, "num_layers": 6, "num_heads": 4, "hidden_dim": 768},  # the demo's
        {"dim": 4096, "num_layers": 32, "num_heads": 32, "hidden_dim": 11008},  # 7B
    ],
)
def test_shares(shape):
    config = with_let(tiny())
    config.model_spec = llama_spec("student", vocab_size=4096, **shape)
    each = Student(config)
    for share in (0.02, 0.1, 1.0):
        size = suite.teacher_shape(each, share)
        assert num_params(**size) / each.num_matmul_params == pytest.approx(share, rel=0.05)
        head_width, rest = divmod(size["dim"], size["num_heads"])
        assert rest == 0 and head_width % 16 == 0
        # Shaped like the student, as far as so few parameters can be.
        assert 0.4 < (size["dim"] / size["num_layers"]) / (each.width / each.num_blocks) < 2.5
