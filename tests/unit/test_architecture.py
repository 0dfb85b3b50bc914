"""Who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import let_plugin

PACKAGE = Path(let_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top of the house to its bottom: a room may import what lies on lower floors. Rooms of one floor do not know
# each other.
FLOORS = (
    ("demo",),
    ("bench",),
    ("train",),
    ("trainer", "preflight"),
    ("guidance",),
    ("teacher",),
    ("tokens",),
    ("runtime",),
    ("config",),
    ("alignment",),
)
FLOOR = {room: len(FLOORS) - i for i, rooms in enumerate(FLOORS) for room in rooms}
EXCEPTIONS = {
    # A loaded configuration builds the trainer with LET mixed in.
    ("config/load.py", "let_plugin.trainer"),
}

# What torchtitan moved or removed after 0.3.0; its names with a leading underscore count, too.
SEAM = (
    "torchtitan.components.checkpointer",
    "torchtitan.components.dataloader",
    "torchtitan.components.optimizer",
    "torchtitan.components.quantization",
    "torchtitan.config.ConfigManager",
    "torchtitan.config.manager",
    "torchtitan.distributed.context_parallel",
    "torchtitan.distributed.cudagraph",
    "torchtitan.experiments",
    "torchtitan.hf_datasets",
)
PRIVATE_METHODS = {"_find_load_step", "_forward_backward_body"}


def imports(path: Path) -> Iterator[str]:
    """The dotted names of all modules and names that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_rooms_import_from_lower_floors_only():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOOR)
    found = set()
    for path in FILES:
        room = place(path).split("/")[0].removesuffix(".py")
        if room == "__init__":
            continue
        if place(path) == "runtime/upstream.py":
            assert not [name for name in imports(path) if is_in(name, "let_plugin")]
        for name in imports(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package != "let_plugin" or other not in FLOOR or other == room:
                continue
            if is_in(name, "let_plugin.runtime.upstream") and room != "alignment":
                continue  # lies below all rooms but the maths
            if FLOOR[other] >= FLOOR[room]:
                found.add((place(path), f"let_plugin.{other}"))
    assert found == EXCEPTIONS


def test_the_maths_imports_torch_and_the_standard_library_only():
    assert is_in("torch.nn", "torch") and not is_in("torchtitan.trainer", "torch")
    for path in (PACKAGE / "alignment").glob("*.py"):
        for name in imports(path):
            allowed = is_in(name, "torch") or is_in(name, "let_plugin.alignment")
            assert allowed or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_private_and_moved_names_of_torchtitan_are_in_the_seam_only():
    for path in FILES:
        if place(path) in ("runtime/upstream.py", "runtime/host.py"):
            continue
        for name in imports(path):
            if is_in(name, "torchtitan"):
                private = any(part.startswith("_") for part in name.split("."))
                assert not private and not any(is_in(name, module) for module in SEAM), f"{place(path)}: {name}"
            assert not name.startswith("let_plugin.runtime.upstream._"), f"{place(path)}: {name}"
        nodes = list(ast.walk(ast.parse(path.read_text())))
        for text in (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)):
            assert not any(is_in(text, module) for module in SEAM), f"{place(path)}: {text!r}"
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not attributes & PRIVATE_METHODS, f"{place(path)}: {attributes & PRIVATE_METHODS}"


def test_nothing_large_is_imported_before_it_is_needed(tmp_path):
    (tmp_path / "a.toml").touch()
    code = "import sys, let_plugin.preflight.teacher_cli; from let_plugin.config import load; load.read(['a.toml']); "
    code += "print({'torch', 'torchtitan', 'transformers'} & set(sys.modules))"
    run = {"cwd": tmp_path, "env": {"PYTHONPATH": str(PACKAGE.parent)}, "text": True}
    assert subprocess.check_output([sys.executable, "-c", code], **run).strip() == "set()"


def test_only_the_host_module_patches_torchtitan():
    """Nothing else assigns to an attribute of an imported torchtitan module or class."""
    for path in FILES:
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
