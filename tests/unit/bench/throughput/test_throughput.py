"""From a command line to the runs of a round: bounds, configurations, and what is refused."""

import pytest
import tomli

from let_plugin.bench import cli
from let_plugin.bench.throughput.cases import Steps
from let_plugin.bench.throughput.run import Options, plan_runs
from let_plugin.config.errors import ConfigError
from let_plugin.config.load import load
from tests.support import jobs
from tests.unit.preflight.test_report import STUDENT_BLOCKS, STUDENT_EMBEDDING, TEACHER_BLOCKS, TEACHER_EMBEDDING


@pytest.fixture
def options(tmp_path):
    def make(**changes):
        values = {
            "cases": ["active", "stopped"],
            "pairs": 2,
            "steps": Steps(measured=3),
            "num_processes": 1,
            "teacher_shares": [],
            "local_batch_sizes": [],
            "seq_lens": [],
            "out": tmp_path / "rows.jsonl",
            "work": tmp_path / "work",
            "profile": False,
            "interleave": False,
        }
        return Options(**values | changes)

    return make


@pytest.fixture
def planned(options, tiny_config, monkeypatch):
    from let_plugin.runtime import data

    monkeypatch.setenv("WORLD_SIZE", "1")
    data.register()
    return lambda overrides=(), **changes: plan_runs(load(tiny_config, list(overrides)), options(**changes))


def test_bounds_are_those_of_the_preflight_report(planned):
    plain, active, stopped = planned(["--training.steps", "20"])
    num_student = STUDENT_BLOCKS + STUDENT_EMBEDDING
    details = active.details
    assert details["flop_bound"] == TEACHER_BLOCKS / (3 * num_student)
    # Teacher and one activation [4, 64, 48], both in fp32.
    assert details["memory_bound_bytes"] == 4 * (TEACHER_BLOCKS + TEACHER_EMBEDDING + 4 * 64 * 48)
    assert (details["num_teacher_params"], details["num_student_params"]) == (TEACHER_BLOCKS, num_student)
    assert (details["run_steps"], details["stop_step"]) == (20, 4)  # of the user's run, not of the measured one
    for run in (plain, stopped):
        assert (run.details["flop_bound"], run.details["memory_bound_bytes"], run.is_active) == (0, 0, False)
    assert {run.details["baseline"] for run in (plain, active, stopped)} == {"plain"}
    assert [tomli.loads(run.config)["training"]["steps"] for run in (plain, active, stopped)] == [7, 7, 7]


def test_random_teachers_of_a_configuration_without_let(planned, options):
    runs = planned(["--let.no-enable"], teacher_shares=[0.05, 0.2], cases=["active"])
    assert [run.label for run in runs] == ["plain", "active 5%", "active 20%"]
    for run, share in zip(runs[1:], (0.05, 0.2), strict=True):
        assert 3 * run.details["flop_bound"] == pytest.approx(share, rel=0.05)
        config = tomli.loads(run.config)
        assert config["let"]["enable"] and (options().work / "teachers" / config["let"]["teacher"]["spec"]).is_dir()
    assert runs[0].teacher is None and runs[1].teacher["vocab_size"] == 4096


def test_mistakes_of_the_configuration(planned, options):
    with pytest.raises(ConfigError) as error:
        planned(["--training.max_norm", "-1"], teacher_shares=[0.1], seq_lens=[60])
    assert {problem.key for problem in error.value.problems} == {"training.max_norm", "training.seq_len"}
    assert not options().work.exists()


def test_mistakes_of_the_options(options, tmp_path):
    bad = options(
        pairs=1,
        steps=Steps(measured=1),
        num_processes=0,
        cases=["active", "stoped"],
        teacher_shares=[0.0, 1.5],
        local_batch_sizes=[0],
        seq_lens=[64, 32, 64],
        out=tmp_path,
    )
    with pytest.raises(ConfigError) as error:
        bad.check()
    assert [problem.key for problem in error.value.problems] == [
        "--pairs",
        "--steps",
        "--processes",
        "--batch-sizes",
        "--seq-lens",
        "--teacher-share",
        "--teacher-share",
        "--cases",
        "--out",
    ]


def test_the_command_refuses_with_one_message(tiny_config, tmp_path, capfd):
    args = ["throughput", str(tiny_config), "--pairs", "0", "--work-dir", str(tmp_path / "work")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*args, "--out", str(tmp_path / "rows.jsonl")])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert (out, err) == (
        "",
        "let-bench: 1 problem in the configuration\n  --pairs = 0: must be at least 2\n",
    )
    assert not (tmp_path / "work").exists()


def test_the_command_without_its_file(capfd):
    with pytest.raises(SystemExit) as stop:
        cli.main(["throughput", str(jobs.ROOT / "no.toml")])
    assert stop.value.code == 2 and "no such file" in capfd.readouterr().err
