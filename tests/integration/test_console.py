"""What a person reads on the console of a job of two processes."""

import re

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

STEP = r"\d\d:\d\d:\d\d  step (\d)/4  loss \d\.\d{4}  (.*)grad norm .* tokens/s per rank  .* GiB  eta .*"


@pytest.mark.parametrize(("layout", "more"), [("FSDP2", ["--let.no-enable"]), ("pipeline", [])])
def test_one_plain_line_for_each_step_and_what_matters_once(tiny_config, layout, more):
    """In a pipeline, the second process has the loss."""
    options = [*jobs.LAYOUTS[layout], *more, "--lr_scheduler.warmup_steps", 9, "--let.stop-step", 2]
    result = jobs.run("let_plugin.train", tiny_config, *options, processes=2)
    lines = result.stdout.splitlines()
    found = [re.fullmatch(STEP, line).groups() for line in lines if " loss " in line]
    assert [step for step, _ in found] == list("1234")
    of_let = ["lambda", "lambda", "LET ended", "LET ended"] if layout == "pipeline" else [""] * 4
    assert all(said.startswith(expected) for (_, said), expected in zip(found, of_let, strict=True))
    assert result.stdout.count("warning: Warmup steps (9) exceed total steps") == 1 == result.stdout.count(" completed")
    assert not re.search(r"\x1b|\[titan\]|rank 1", result.stdout) and len(lines) < 26
    assert not result.stderr


def test_torchtitans_own_console(tiny_config):
    options = ["--log", "titan", "--let.no-enable", "--training.steps", 1, "--lr_scheduler.warmup_steps", 1]
    result = jobs.run("let_plugin.train", tiny_config, *options)
    assert len(re.findall(r"\[titan\] .* - root - INFO - .*step:  1 ", result.stdout)) == 1
    assert "step 1/1" not in result.stdout and "WARNING" not in result.stdout
