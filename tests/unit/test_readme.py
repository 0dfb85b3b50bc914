"""README's table of keys is the configuration's."""

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

from let_plugin.bench import tables
from let_plugin.config import LetConfig
from let_plugin.demo import compare
from tests.support.jobs import ROOT

README = (ROOT / "README.md").read_text()


def defaults(config, prefix=""):
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from defaults(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def test_every_let_key_is_listed_with_its_default():
    section = README.split("### The `[let]` table")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `([\w.]+)` \| \w+ \| (`[^`]*`|none) \|", section, flags=re.M))
    written = {None: "none", True: "`true`", False: "`false`"}
    expected = {
        key: written[value] if value is None or isinstance(value, bool) else f"`{value!r}`".replace("'", '"')
        for key, value in defaults(LetConfig())
    }
    assert listed == expected


def test_the_demo_result_is_the_recorded_one():
    rows = (ROOT / "benchmarks/results/demo.jsonl").read_text().splitlines()
    shown = README.split("<!-- demo result: begin -->")[1].split("<!-- demo result: end -->")[0]
    assert compare.table(json.loads(rows[-1])) in shown


def test_tables_are_those_of_the_committed_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    results = (ROOT / "docs/results.md").read_text()
    shown = dict(re.findall(r"<!-- let-bench table (\S+) -->\n```\n(.*?)\n```", results + README, flags=re.S))
    committed = {f"benchmarks/results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.jsonl")}
    assert set(shown) == committed - {"benchmarks/results/demo.jsonl"}
    for file, table in shown.items():
        assert table == tables.text([Path(file)])


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"`((?:train_configs|docs|benchmarks|tests|let_plugin)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
