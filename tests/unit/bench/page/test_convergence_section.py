"""Known speed-ups come out as they are, and what is not significant is said to be so."""

import pytest

from let_plugin.bench import rows
from let_plugin.bench.page import convergence_section
from let_plugin.config.errors import ConfigError
from tests.support import synthetic_rows
from tests.support.synthetic_rows import finding, line


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def section(path):
    (made,) = convergence_section.sections(rows.read(path))
    return made


def test_known_speed_ups(path):
    synthetic_rows.converge(path)
    final, speed_ups = section(path).tables
    assert final.lines[0][0] == "standard"
    # log10(2) lower, with a tenth more FLOPs and time, and half more memory.
    assert line(final, "let@1")["- standard, paired"] == "-0.3010 [-0.3010, -0.3010]"
    assert line(final, "let@1")["peak memory"] == "150.0 MiB"
    ratios = line(speed_ups, "let@1")
    assert ratios["pairs"] == "5"
    assert ratios["in training tokens"] == "2.000 [2.000, 2.000]"
    assert ratios["in FLOPs"] == ratios["in wall-clock seconds"] == "1.818 [1.818, 1.818]"


def test_the_summary_says_what_is_significant_and_what_is_not(path):
    synthetic_rows.converge(path)
    made = section(path)
    assert finding(made, "let@1: final loss significantly lower").verdict == "better"
    assert finding(made, "RKD: no significant difference").verdict == "open"
    assert "2 comparisons" in made.findings[-1].text  # of losses: no speed-up is called significant


def test_let_is_compared_with_the_controls_at_its_weight(path):
    methods = {"standard": 1.0, "let@1": 2.0, "let@0.1": 1.5, "labels@1": 1.5, "random_teacher@1": 2.0}
    synthetic_rows.converge(path, methods=methods)
    made = section(path)
    assert finding(made, "let@1: final loss significantly lower than that of its control labels@1").verdict == "better"
    assert finding(made, "let@1: no significant difference from its control random_teacher@1").verdict == "open"
    # Four with the baseline, and two with controls: let@0.1 has none.
    assert "6 comparisons" in made.findings[-1].text


def test_a_method_that_is_worse_is_called_worse(path):
    synthetic_rows.converge(path, methods={"standard": 1.0, "slow": 0.5})
    made = section(path)
    assert finding(made, "slow: final loss significantly higher").verdict == "worse"
    assert line(made.tables[1], "slow")["in training tokens"] == "reached in 0 of 5"
    assert all("speed-up" not in figure.name for figure in made.figures)


def test_one_seed_says_nothing_about_significance(path):
    synthetic_rows.converge(path, seeds=1)
    assert {f.verdict for f in section(path).findings} == {"note"}


def test_without_a_baseline_nothing_is_compared(path):
    synthetic_rows.converge(path, methods={"let@1": 2.0})
    made = section(path)
    assert "nothing to compare with" in made.findings[0].text
    assert [figure.name for figure in made.figures] == [
        f"convergence-1-{axis}" for axis in ("tokens", "flops", "seconds")
    ]


def test_figures_say_runs_device_and_commit(path):
    synthetic_rows.converge(path)
    made = section(path)
    assert len(made.figures) == 5
    for figure in made.figures:
        assert "15 runs on a CPU (" in figure.caption and "commit " in figure.caption, figure.name
    # A token of a method with half more memory counts as one and a half.
    memory = next(figure for figure in made.figures if figure.name.endswith("-memory"))
    assert memory.description.startswith("Last points: standard 0.695 at 2e+05; let@1 0.394 at 3e+05;")


def test_tuning_runs_are_not_results_and_the_choice_is_shown(path):
    synthetic_rows.converge(path, seeds=2)
    content = rows.read(path)
    for number in range(2):
        rows.append(path, content[number] | {"role": "tuning", "seed": 7})
    choice = {"suite": "c", "method": "let", "weights": [0.1, 1.0], "chosen": 1.0, "tuning_seeds": [7, 8]}
    choice["diverged"] = [10.0]
    synthetic_rows.append(path, convergence_section.CHOICE, [0.9, 0.8], "nats/token", seed=None, **choice)
    made = section(path)
    assert made.origin.startswith("6 runs")
    assert list(made.tables[-1].lines[0]) == ["let", "1", "0.1, 1, 10", "0.9000, 0.8000, diverged", "7, 8"]


def test_of_a_run_made_twice_the_later_counts(path):
    synthetic_rows.converge(path, seeds=1)
    synthetic_rows.converge(path, seeds=2)
    assert section(path).origin.startswith("6 runs")


def test_rows_that_are_no_runs_are_named(path):
    synthetic_rows.append(path, "converge", [1.0], "nats/token", method="standard")
    with pytest.raises(ConfigError, match="curve"):
        convergence_section.sections(rows.read(path))
