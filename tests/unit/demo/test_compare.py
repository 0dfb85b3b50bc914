"""The comparison of runs, from `metrics.jsonl` to numbers and a table."""

import json

import pytest

from let_plugin.demo.compare import PEAK_MEMORY, TOKENS_PER_SECOND, VALIDATION_LOSS, compare, table


def write_run(folder, validation, speed, stop=None):
    """Logged steps 1 to 6. The first is slow and large, as compilation makes it; `stop`: LET's first step without."""
    lines = []
    for step in range(1, 7):
        line = {"step": step, "loss_metrics/global_avg_loss": 5.0, "time": 0.0}
        line |= {TOKENS_PER_SECOND: 1.0 if step == 1 else speed + step, PEAK_MEMORY: 9.0 if step == 1 else step / 10}
        if stop is not None:
            active = step < stop
            line |= {"let/active": float(active), "let/lambda": 0.1 * active}
            line |= {"let/cosine": 0.5} if active else {}
        lines.append(line)
        if step in validation:
            lines.append({"step": step, "time": 0.0, VALIDATION_LOSS: validation[step]})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_beside_the_first(tmp_path):
    """A first step with the teacher does not count: it contains compilation."""
    folders = {
        "plain": write_run(tmp_path / "plain", {2: 5.0, 4: 4.0, 6: 3.0}, speed=100),
        "wins": write_run(tmp_path / "wins", {2: 4.0, 4: 3.2, 6: 2.7}, speed=50, stop=4),
        "loses": write_run(tmp_path / "loses", {6: 3.25}, speed=50, stop=7),
        "stopped": write_run(tmp_path / "stopped", {6: 3.25}, speed=50, stop=2),
    }
    result = compare(folders)
    assert json.loads(json.dumps(result)) == result
    assert result["steps"] == 6
    keys = ("held_out_loss", "reached_first_at_step", "tokens_per_second_with_teacher", "tokens_per_second_without")
    assert {name: [run[key] for key in keys] for name, run in result["runs"].items()} == {
        "plain": [3.0, None, None, 104.0],
        "wins": [2.7, pytest.approx(4.8), 52.5, 55.0],  # with the teacher in steps 2 and 3
        "loses": [3.25, None, 54.0, None],
        "stopped": [3.25, None, None, 54.0],
    }
    assert result["runs"]["wins"]["peak_memory_gib"] == 0.6
    assert [line.split() for line in table(result).splitlines()[1:4]] == [
        ["plain", "3.0000", "-", "-", "-", "104", "0.60"],
        ["wins", "2.7000", "-0.3000", "5", "of", "6:", "1.25x", "fewer", "52", "55", "0.60"],
        ["loses", "3.2500", "+0.2500", "not", "reached", "54", "-", "0.60"],
    ]
