"""Known costs come out as they are, with a verdict that the noise allows."""

import pytest

from let_plugin.bench import rows
from let_plugin.bench.page import throughput_section
from tests.support import synthetic_rows
from tests.support.synthetic_rows import finding, line


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def section(path):
    (made,) = throughput_section.sections(rows.read(path))
    return made


def test_tables_have_the_known_ratios(path):
    synthetic_rows.throughput(path)
    time, memory = section(path).tables
    assert line(time, "plain batch 2")["step time / plain"] == "1"
    active = line(time, "active 20% batch 2")
    assert active["step time / plain"] == "1.0800 [1.0800, 1.0800]"
    assert active["tokens/s / plain"] == "0.9259 [0.9259, 0.9259]"
    assert (active["FLOP bound"], active["break-even"]) == ("1.0667", "1.042x")
    assert line(time, "stopped batch 4")["break-even"] == ""
    assert line(memory, "active 20% batch 2") == {
        "case": "active 20% batch 2",
        "resident peak": "110.0 MiB",
        "resident / plain": "1.1000 [1.1000, 1.1000]",
        "more resident": "+10.0 MiB",
        "bound": "+8.0 MiB",
    }


def test_regressions_find_the_known_slopes(path):
    synthetic_rows.throughput(path)
    made = section(path)
    assert "slope 0.400 [0.400, 0.400] per N_T / N_S" in finding(made, "active, batch 2, length 128").text
    assert "slope 0.200 [0.200, 0.200] per N_T / N_S" in finding(made, "active, batch 4, length 128").text
    text = finding(made, "active, teacher 20.0%, length 128: overhead against local batch size").text
    assert "-4.00% [-4.00%, -4.00%] of a plain step more per doubling; significant" in text


def test_noise_that_hides_a_difference_is_not_resolved(path):
    synthetic_rows.throughput(path, noise=0.01)
    made = section(path)
    assert finding(made, "active 20% batch 2: significantly slower").verdict == "worse"
    assert finding(made, "stopped batch 2: no significant difference in speed").verdict == "open"
    assert "14 comparisons" not in made.findings[-1].text and "16 comparisons at 95%" in made.findings[-1].text


def test_one_pair_says_nothing_about_significance(path):
    synthetic_rows.throughput(path, pairs=1)
    made = section(path)
    assert {f.verdict for f in made.findings} == {"note"}
    assert "one pair, no interval" in finding(made, "active 20% batch 2").text


def test_figures_say_runs_device_and_commit(path):
    synthetic_rows.throughput(path, pairs=3)
    commit = rows.provenance()["commit"]
    figures = section(path).figures
    assert len(figures) == 6
    for figure in figures:
        assert "24 runs on a CPU (" in figure.caption and f"commit {commit}" in figure.caption, figure.name
        assert figure.description


def test_a_round_that_was_broken_off_is_left_out(path):
    synthetic_rows.throughput(path, pairs=2)
    content = path.read_text().splitlines(keepends=True)
    path.write_text("".join(content[:-1]))
    assert section(path).origin.startswith("8 runs")


def test_a_profile_adds_up(path):
    synthetic_rows.throughput(path, pairs=2)
    synthetic_rows.profile(path)
    table = section(path).tables[-1]
    assert line(table, "teacher forward")["of the step"] == "10.00%"
    assert line(table, "the student's own step")["ms/step"] == "895.00"


def test_no_complete_round_is_no_section(path):
    synthetic_rows.profile(path)
    assert throughput_section.sections(rows.read(path)) == []
