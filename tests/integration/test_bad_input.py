"""Bad input under torchrun: the message comes through, whichever rank fails first, and nothing is written."""

import pytest

from tests.support import jobs


@pytest.mark.slow
def test_two_processes_say_what_is_wrong(tmp_path, tiny_config):
    result = jobs.run("let_plugin.train", tiny_config, "--let.weight", "-1", torchrun=True, processes=2, check=False)
    assert result.returncode != 0
    assert "let.weight = -1: must be at least 0" in result.stderr
    assert not (tmp_path / "out").exists()
