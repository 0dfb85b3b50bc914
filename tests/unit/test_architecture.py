"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import let_plugin

PACKAGE = Path(let_plugin.__file__).parent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_maths_imports_torch_and_the_registry_only():
    allowed = (
        "abc",
        "torch",
        "let_plugin.alignment",
        "let_plugin.alignment.registry",
        "fractions",
        "functools",
        "math",
        "collections.abc",
        "contextlib",
        "dataclasses",
        "fractions",
        "functools",
        "math",
        "typing",
    )
    for path in (PACKAGE / "alignment").glob("*.py"):
        for name in imports(path):
            assert name.startswith(allowed), f"{path.name} imports {name}"


def test_teachers_and_metrics_do_not_import_the_trainer():
    for path in [*(PACKAGE / "teacher").rglob("*.py"), PACKAGE / "guidance/metrics.py"]:
        assert "let_plugin.trainer" not in set(imports(path)), path.name


def test_importing_the_package_is_cheap():
    code = "import sys, let_plugin; print({'torch', 'torchtitan', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_only_the_host_module_patches_torchtitan():
    """Nothing else assigns to an attribute of an imported torchtitan module or class."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "host.py":
            continue
        tree = ast.parse(path.read_text())
        titan = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchtitan")
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in titan, f"{path.name}:{node.lineno} assigns to {target.value.id}"
