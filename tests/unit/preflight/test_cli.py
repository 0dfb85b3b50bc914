"""`let-teacher`, as users call it; `test_inspection.py` has what it says."""

import pytest

from let_plugin.preflight import teacher_cli as cli
from tests.support.jobs import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "PATH = '/nowhere': there is no such folder"),
        (["--import", "let_plugin.demo.config_registry", "--spec", "demo_teachr"], "did you mean 'demo_teacher'?"),
        (["let_plugin/demo/assets/teacher", "--tokenizer", "/nowhere"], "--tokenizer = '/nowhere'"),
        (["let_plugin/demo/assets/teacher", "--max-tokens", "0"], "--max-tokens = 0"),
        (["--spec", "llama3:1B", "--import", "no_such_module"], "--import = 'no_such_module'"),
    ],
)
def test_bad_input_is_one_error(monkeypatch, capsys, arguments, message):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", *arguments, "--device", "cpu"])
    heading, problem = capsys.readouterr().err.splitlines()
    assert heading == "let-teacher inspect: 1 problem in the configuration"
    assert message in problem


@pytest.mark.parametrize("arguments", [[], ["inspct"], ["inspect", "--nonsense"]])
def test_an_unknown_command_or_option(arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
