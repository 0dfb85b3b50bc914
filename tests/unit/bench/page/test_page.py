"""One page that needs nothing beside it, with nothing on it that is not a row; bad input writes nothing."""

import re
from html.parser import HTMLParser

import pytest

from let_plugin.bench import cli, page
from let_plugin.config.errors import ConfigError
from tests.support import synthetic_rows

HOSTILE = '<script>alert("x")</script> & $\\frac{1}{2}$'


class Checker(HTMLParser):
    """Notes what a page refers to, its ids, and elements that are not closed in order."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.refers, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [value for name in ("href", "src", "xlink:href") if (value := attrs.get(name))]
        self.refers += [*(attrs.get("aria-labelledby") or "").split(), *re.findall(r"url\(#(.*?)\)", str(attrs))]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    synthetic_rows.throughput(path, pairs=2, name=HOSTILE)
    synthetic_rows.converge(path, seeds=2, methods={"standard": 1.0, HOSTILE: 1.5})
    return path


def test_the_page(path, tmp_path):
    written = page.write([path, path], tmp_path / "out")  # a file that is named twice counts once
    html = written[0].read_text()
    checker = Checker()
    checker.feed(html)
    assert not checker.open and "script" not in checker.tags and "img" not in checker.tags
    assert len(checker.ids) == len(set(checker.ids))
    for link in checker.links:
        assert link == "data:," or (link[0] == "#" and link[1:] in checker.ids), link
    assert set(checker.refers) <= set(checker.ids)
    assert "&lt;script&gt;alert(" in html and "<script" not in html
    assert "Made of 20 rows" in html
    assert checker.tags.count("figure") == checker.tags.count("svg") == len(written) - 1 == 11
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written[1:])


def test_the_same_rows_make_the_same_page(path, tmp_path):
    first, second = (page.write([path], tmp_path / name)[0].read_text() for name in ("a", "b"))
    assert first == second


def test_the_command(path, tmp_path, capsys):
    cli.main(["report", str(path), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'index.html'} and 11 PNG files\n"


@pytest.mark.parametrize("more", [["--training.steps", "3"], ["missing.jsonl"]])
def test_bad_input_writes_nothing(path, tmp_path, more, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(path), *more, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2 and more[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_without_anything_to_show(tmp_path):
    synthetic_rows.profile(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="no complete pair of throughput runs"):
        page.write([tmp_path / "rows.jsonl"], tmp_path / "out")


def test_out_is_a_file(path):
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        page.write([path], path)
