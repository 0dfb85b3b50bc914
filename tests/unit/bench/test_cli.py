"""What is wrong with a command line ends with one message, before anything is written."""

import pytest

from let_plugin.bench import cli


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("throughput", "--pairs", "1", "argument --pairs: expected a number at least 2, not 1"),
        ("throughput", "--teacher-share", "150", "expected a number from 0.01 to 100, not 150"),
        ("throughput", "--out", ".", "argument --out: . is a folder; expected a file"),
        ("throughput", "--work-dir", "/proc/x", "  --work-dir = '/proc/x': /proc is not writable"),
        ("converge", "--methods", "lett", "let-bench: 1 problem in the configuration\n  --methods = 'lett': unknown"),
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
