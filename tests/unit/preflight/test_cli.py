"""`let-teacher`, as users call it; `test_inspection.py` has what it says."""

import os
import subprocess
import sys

import pytest

from let_plugin.preflight import teacher_cli as cli
from tests.support.jobs import ROOT


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["/nowhere"], ["PATH = '/nowhere': there is no such folder"]),
        ([], ["PATH = '': no teacher is given"]),
        (["--spec", "demo_teachr"], ["--spec = 'demo_teachr'", "did you mean 'demo_teacher'?"]),
        (["let_plugin/demo/assets/teacher", "--tokenizer", "/nowhere"], ["--tokenizer = '/nowhere'"]),
        (["let_plugin/demo/assets/teacher", "--max-tokens", "0"], ["--max-tokens = 0"]),
        (["--spec", "llama3:1B", "--import", "no_such_module"], ["--import = 'no_such_module'"]),
    ],
)
def test_bad_input_is_one_error(monkeypatch, capsys, arguments, messages):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    monkeypatch.chdir(ROOT)
    assert cli.main(["inspect", *arguments, "--device", "cpu"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("error: ") == 1
    for message in messages:
        assert message in errors


def test_export_takes_options_of_the_configuration(monkeypatch, capsys, tiny_config, tmp_path):
    pytest.importorskip("torchtitan")
    monkeypatch.setenv("WORLD_SIZE", "1")
    arguments = ["export", str(tiny_config), "--out", str(tmp_path / "states"), "--check"]
    assert cli.main([*arguments, "--let.stop_step", "2"]) == 0
    assert "8 rows" in capsys.readouterr().out
    assert cli.main([*arguments, "--let.stop_stp", "2"]) == 2


@pytest.mark.parametrize("arguments", [[], ["inspct"], ["inspect", "--nonsense"]])
def test_an_unknown_command_or_option(arguments):
    with pytest.raises(SystemExit) as info:
        cli.main(arguments)
    assert info.value.code == 2


def test_help_is_cheap_and_the_module_can_be_run():
    code = "import sys; import let_plugin.preflight.teacher_cli; print({'torch', 'transformers'} & set(sys.modules))"
    run = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    assert subprocess.check_output([sys.executable, "-c", code], **run).strip() == "set()"
    output = subprocess.check_output(
        [sys.executable, "-m", "let_plugin.preflight.teacher_cli", "inspect", "--help"], **run
    )
    assert "--spec NAME" in output
