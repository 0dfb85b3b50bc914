"""What a user reads if `base` names no configuration."""

import sys
from pathlib import Path

import pytest

from let_plugin.config.errors import ConfigError
from let_plugin.config.load import load

MODULE = """
def fails():
    return helper({})

def helper(sizes):
    return sizes["width"]

def wrong():
    return 3
"""


@pytest.mark.parametrize(
    ("base", "messages"),
    [
        ("", ["base = '': expected \"module.function\""]),
        ('base = "llama.llama3_debugmodel"\n', ["did you mean 'llama3'?"]),
        ('base = "llama3.llama3_debug"\n', ["no function 'llama3_debug'", "did you mean 'llama3_debugmodel'?"]),
        ('base = "no_such.module.f"\n', ["no module 'no_such.module'"]),
        ('base = "deepseek_v3.enable_fused_swiglu"\n', ["missing 1 required positional argument"]),
        ('base = "my_configs.fails"\n', ["KeyError: 'width'", "line 3, in fails", "return helper({})", "sizes["]),
        ('base = "my_configs.wrong"\n', ["returns a int"]),
        ('base = "my_configs.mine"\n', ["valid names: fails, helper, wrong"]),
        ('base = "package.f"\n', ["cannot import name 'NoSuchName'"]),
    ],
)
def test_wrong_base(tmp_path, monkeypatch, base, messages):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_configs.py").write_text(MODULE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/config_registry.py").write_text("from torchtitan.trainer import NoSuchName\n")
    (tmp_path / "run.toml").write_text(base)
    with pytest.raises(ConfigError) as info:
        load(Path("run.toml"), [])
    assert [(problem.key, problem.source) for problem in info.value.problems] == [("base", "run.toml")]
    assert all(message in str(info.value) for message in messages), info.value
