"""`let-teacher`, as users call it; `test_inspection.py` has what it says."""

import os
import subprocess
import sys

import pytest

from let_plugin.teacher import cli
from tests.support.jobs import ROOT


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["/nowhere"], ["PATH = '/nowhere': there is no such folder"]),
        ([], ["PATH = '': no teacher is given"]),
        (["--spec", "smollm2-135"], ["--spec = 'smollm2-135'", "did you mean 'smollm2-135m'?"]),
        (["let_plugin/demo/assets/teacher", "--tokenizer", "/nowhere"], ["--tokenizer = '/nowhere'"]),
        (["let_plugin/demo/assets/teacher", "--max-tokens", "0"], ["--max-tokens = 0"]),
        (["--spec", "smollm2-135m", "--import", "no_such_module"], ["--import = 'no_such_module'"]),
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


@pytest.mark.parametrize("arguments", [[], ["inspct"], ["inspect", "--nonsense"]])
def test_an_unknown_command_or_option(arguments):
    with pytest.raises(SystemExit) as info:
        cli.main(arguments)
    assert info.value.code == 2


def test_help_is_cheap_and_the_module_can_be_run():
    code = "import sys; from let_plugin.teacher import cli; print({'torch', 'transformers'} & set(sys.modules))"
    run = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    assert subprocess.check_output([sys.executable, "-c", code], **run).strip() == "set()"
    output = subprocess.check_output([sys.executable, "-m", "let_plugin.teacher.cli", "inspect", "--help"], **run)
    assert "--spec NAME" in output
