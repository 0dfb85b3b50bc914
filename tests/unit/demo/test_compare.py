"""The comparison of two runs, from `metrics.jsonl` to numbers and a table."""

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


@pytest.fixture
def plain(tmp_path):
    return write_run(tmp_path / "plain", {2: 5.0, 4: 4.0, 6: 3.0}, speed=100)


def test_a_run_that_wins(plain, tmp_path):
    result = compare(plain, write_run(tmp_path / "let", {2: 4.0, 4: 3.2, 6: 2.7}, speed=50, stop=4))
    assert result == {
        "steps": 6,
        "held_out_loss": {"plain": 3.0, "let": 2.7},
        "let_reached_plain_final_loss_at_step": pytest.approx(4.8),
        # Without the first step; LET is active in steps 2 and 3, and has ended in steps 4 to 6.
        "tokens_per_second": {"plain": 104.0, "let_active": 52.5, "let_ended": 55.0},
        "peak_memory_gib": {"plain": 0.6, "let_active": 0.3, "let_ended": 0.6},
    }
    assert [line.split() for line in table(result).splitlines()[1:4]] == [
        ["tokens/s", "(median)", "104", "52", "55"],
        ["peak", "memory,", "GiB", "0.60", "0.30", "0.60"],
        ["held-out", "loss,", "nats/token", "3.0000", "2.7000", "(-0.3000)"],
    ]
    assert table(result).endswith("\nLET reached the plain run's final loss at step 5 of 6: 1.25x fewer steps")


@pytest.mark.parametrize(("stop", "missing"), [(4, []), (7, ["let_ended"]), (2, ["let_active"])])
def test_a_run_that_loses_with_the_teacher_throughout_or_not_at_all(plain, tmp_path, stop, missing):
    """A first step with the teacher does not count: it contains compilation."""
    let = write_run(tmp_path / "let", {6: 3.25}, speed=50, stop=stop)
    result = compare(plain, let)
    for key in ("tokens_per_second", "peak_memory_gib"):
        assert [name for name, value in result[key].items() if value is None] == missing
    assert json.loads(json.dumps(result)) == result
    assert table(result).endswith("3.2500 (+0.2500)\nLET did not reach the plain run's final loss in 6 steps")
