"""The `[let]` and `[runtime]` tables are documented and cheap."""

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from let_plugin.config import tables as config


def documented_fields(class_name):
    """Names of the fields in the source that a docstring follows."""
    tree = ast.parse(Path(config.__file__).read_text())
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    return [
        field.target.id
        for field, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and len(after.value.value.split()) > 3
    ]


# `teacher` holds a table of its own, which has a docstring.
@pytest.mark.parametrize(
    ("cls", "tables"),
    [
        (config.LetConfig, {"teacher", "projector", "adaptive_stop", "token_alignment"}),
        (config.AdaptiveStopConfig, set()),
        (config.PairConfig, set()),
        (config.TokenAlignmentConfig, set()),
        (config.ProjectorConfig, set()),
        (config.TeacherConfig, set()),
        (config.RuntimeConfig, set()),
    ],
)
def test_every_field_is_documented(cls, tables):
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    assert set(documented_fields(cls.__name__)) == {field.name for field in fields(cls)} - tables


def test_names_that_the_registries_know_are_the_defaults():
    from let_plugin.alignment.layer_mapping import LAYER_MAPPINGS
    from let_plugin.config import plan

    let = config.LetConfig()
    plan.schedule(let)
    plan.loss(let)
    plan.dimension_match(let)
    assert let.layer_mapping in LAYER_MAPPINGS


def test_let_is_off_unless_asked_for():
    assert config.LetConfig().enable is False
    assert config.LetConfig() == config.LetConfig()
    assert config.LetConfig().teacher is not config.LetConfig().teacher


def test_importing_it_imports_neither_torch_nor_torchtitan():
    code = "import sys, let_plugin.config; print({'torch', 'torchtitan', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
