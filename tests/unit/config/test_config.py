"""The `[let]` and `[runtime]` tables, their reference, and what a user reads after a mistake."""

import re
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from let_plugin.config import LetConfig, PairConfig, RuntimeConfig, reference
from let_plugin.config.load import load
from let_plugin.config.overlay import OLD_KEYS
from let_plugin.config.schema import check_bounds, walk
from tests.support.jobs import ROOT
from tests.support.problems import problem_of, problems_of


def test_the_reference_is_the_committed_one_and_every_key_has_a_text():
    text = reference.text()
    assert (ROOT / "docs/configuration.md").read_text() == text, (
        "run python -m let_plugin.config.reference > docs/configuration.md"
    )
    for cls in (LetConfig, RuntimeConfig):
        assert all(len(row[-1].split()) > 3 for row in reference.rows(cls))


# One of each kind, and of each place; docs/configuration.md has them all.
BOUNDS = [
    ("training.steps", 0, "at least 1"),
    ("training.max_norm", float("nan"), "finite and at least 0"),
    ("let.temperature", 0.0, "more than 0"),
    ("let.pairs.0.weight", -1.0, "at least 0"),
    ("let.teacher.center_momentum", 1.0, "at least 0 and less than 1"),
]


@pytest.mark.parametrize(("key", "value", "message"), BOUNDS)
def test_bounds_of_what_python_sets(config, key, value, message):
    config.let.pairs = [PairConfig(student=0)]
    check_bounds(config)
    table, _, name = key.rpartition(".")
    setattr(config.let.pairs[0] if table == "let.pairs.0" else attrgetter(table)(config), name, value)
    assert str(problem_of(check_bounds, config)) == f"{key} = {value!r}: must be {message}"


def test_old_keys_are_gone_and_what_they_are_called_now_exists():
    keys = {key for key, _, _ in (*walk(llama3_debugmodel()), *walk(LetConfig(), "let"))}
    assert not keys & set(OLD_KEYS)
    new = {key for text in OLD_KEYS.values() for key in re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", text)}
    new |= {table for text in OLD_KEYS.values() for table in re.findall(r"\[([a-z_.]+)\]", text)}
    assert len(new) > 8
    assert new - keys == {"activation_checkpoint.type"}


MODULE = """
def fails():
    return helper({})

def helper(sizes):
    return sizes["width"]

def wrong():
    return 3

def deep():
    from torchtitan.models.llama3 import model_registry
    return model_registry("9B")
"""


@pytest.mark.parametrize(
    ("base", "messages"),
    [
        ("", ["base = '': expected \"module.function\""]),
        ('base = "llama.llama3_debugmodel"\n', ["did you mean 'llama3'?"]),
        ('base = "llama3.llama3_debug"\n', ["no function 'llama3_debug'", "did you mean 'llama3_debugmodel'?"]),
        ('base = "no_such.module.f"\n', ["no module 'no_such.module' on PYTHONPATH or in the working directory, "]),
        ('base = "deepseek_v3.enable_fused_swiglu"\n', ["missing 1 required positional argument"]),
        ('base = "my_configs.fails"\n', ["KeyError: 'width'", "line 3, in fails", "return helper({})", "sizes["]),
        ('base = "my_configs.wrong"\n', ["returns a int"]),
        ('base = "my_configs.deep"\n', ["failed: KeyError: '9B'", "in deep"]),
        ('base = "my_configs.mine"\n', ["valid names: deep, fails, helper, wrong"]),
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
    (problem,) = problems_of(load, Path("run.toml"), []).values()
    assert (problem.key, problem.source) == ("base", "run.toml")
    assert all(message in str(problem) for message in messages), problem
    assert not re.search('File ".*site-packages', str(problem))  # the user's own frames alone
