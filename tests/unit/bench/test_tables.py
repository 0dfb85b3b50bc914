"""Tables of rows that are there, without running anything."""

import pytest

from let_plugin.bench import cli, rows, summary, tables
from let_plugin.config.errors import ConfigError
from tests.support import synthetic_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def test_a_table_for_each_suite(path, capsys):
    synthetic_rows.throughput(path, suite="a")
    synthetic_rows.throughput(path, suite="b", pairs=2)
    cli.main(["table", str(path)])
    assert capsys.readouterr().out == f"{summary.table(path, 'a')}\n\n{summary.table(path, 'b')}\n"


def test_a_round_that_is_not_complete_does_not_count(path):
    synthetic_rows.throughput(path, pairs=3)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert tables.text([path]).count("2 pairs on a CPU") == 1


def test_mistakes(path, tmp_path):
    path.touch()
    with pytest.raises(ConfigError, match=r"no complete pair of throughput runs .* \(no rows at all\)"):
        tables.text([path])
    with pytest.raises(ConfigError, match="no such file"):
        tables.text([tmp_path / "no.jsonl"])


def test_an_option_of_a_configuration_has_no_place_here(path, capsys):
    rows.append(path, rows.row("x", command="", config="", seed=0, unit="", values=[1], origin=rows.provenance()))
    with pytest.raises(SystemExit) as stop:
        cli.main(["table", str(path), "--training.steps", "2"])
    assert stop.value.code == 2 and "no such option of let-bench table" in capsys.readouterr().err
