"""`make house`: the size of the package and of the tests, and the bounds that tests/unit/test_house.py keeps."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "let_plugin", ROOT / "tests"

BOUNDS = {
    "lines of the package": 13_456,
    "lines of the tests": 11_525,
    "entries at the top of the package": 12,
    "Python files in one folder of the package": 12,
    "lines of the longest file": 400,
    "lines of the longest function": 60,
    "lines of README.md": 200,
}


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]


def num_lines(path: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in python_files(path))


def entries(folder: Path) -> list[Path]:
    """The modules and packages that lie directly in a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix == ".py" or any(path.glob("**/*.py")))


def functions() -> list[tuple[int, str]]:
    """(lines, place) of every function of the package and of the tests."""
    return [
        (node.end_lineno - node.lineno + 1, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
        for file in python_files(PACKAGE) + python_files(TESTS)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def measure() -> dict[str, tuple[int, str]]:
    """Name of a bound -> the number today, and where it is."""
    num_files = Counter(str(file.parent.relative_to(ROOT)) for file in python_files(PACKAGE))
    folder, most = num_files.most_common(1)[0]
    longest_file = max((num_lines(f), str(f.relative_to(ROOT))) for f in python_files(PACKAGE) + python_files(TESTS))
    numbers = [
        (num_lines(PACKAGE), "let_plugin"),
        (num_lines(TESTS), "tests"),
        (len(entries(PACKAGE)), "let_plugin"),
        (most, folder),
        longest_file,
        max(functions()),
        (len((ROOT / "README.md").read_text().splitlines()), "README.md"),
    ]
    return dict(zip(BOUNDS, numbers, strict=True))


if __name__ == "__main__":
    for top in (PACKAGE, TESTS):
        for path in entries(top):
            print(f"{num_lines(path):7,}  {path.relative_to(ROOT)}")
    for name, (number, place) in measure().items():
        print(f"{number:7,}  {name} (bound {BOUNDS[name]:,}; {place})")
