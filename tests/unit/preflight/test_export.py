"""The command line of the export."""

import pytest

from let_plugin.preflight import export


def test_check_prints_what_it_takes_and_writes_nothing(tiny_config, tmp_path, capsys):
    argv = [str(tiny_config), "--out", str(tmp_path / "features"), "--check", "--let.stop-step", "3"]
    export.main(argv)
    printed = capsys.readouterr().out
    assert "rows       12 of 64 tokens, 768 tokens in all" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.toml"]


def test_bad_input_ends_with_its_mistakes_and_code_2(tiny_config, tmp_path, capsys):
    argv = [str(tiny_config), "--out", str(tmp_path / "features"), "--encoding", "zip", "--let.weight", "heavy"]
    with pytest.raises(SystemExit) as info:
        export.main(argv)
    assert info.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("let-teacher export: 2 problems in the configuration")
    assert "--encoding = 'zip': unknown encoding" in printed and "command line: let.weight = 'heavy'" in printed
    assert not (tmp_path / "features").exists()


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as info:
        export.main(["--help"])
    assert info.value.code == 0 and "--data-parallel-degree" in capsys.readouterr().out
