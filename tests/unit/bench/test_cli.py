"""What is wrong with a command line ends with one message, before anything is written."""

import pytest

from let_plugin.bench import cli


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("throughput", "--pairs", "1", "argument --pairs: expected an integer, at least 2, not 1"),
        (
            "throughput",
            "--teacher-share",
            "150",
            "expected a percentage above 0, at most 100, not 150",
        ),
        ("throughput", "--cases", "stoped", "argument --cases: invalid choice: 'stoped'"),
        ("throughput", "--out", ".", "let-bench: 1 problem in the configuration\n  --out = '.'"),
        ("converge", "--methods", "lett", "let-bench: 1 problem in the configuration\n  --methods = 'lett': unknown"),
        ("converge", "--tuning-seeds", "-1", "argument --tuning-seeds: expected an integer, at least 0, not -1"),
        ("table", "--training.steps", "2", "unrecognized arguments: --training.steps 2"),
    ],
)
def test_mistakes(config_file, tmp_path, capfd, command, option, value, message):
    files = ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "rows.jsonl")] if command != "table" else []
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(config_file), *files, option, value])
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == "" and message in err
    assert not (tmp_path / "work").exists() and not (tmp_path / "rows.jsonl").exists()


def test_what_is_given_twice_counts_once():
    args, _ = cli.parse(["throughput", "x.toml", "--teacher-share", "2", "1", "2"])
    assert args.teacher_share == [2, 1]
