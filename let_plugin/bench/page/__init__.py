"""`let-bench report`: one page out of rows, that needs nothing beside it, and its figures as PNG."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from let_plugin.bench import rows
from let_plugin.bench.page import convergence_section, downstream_section, parts, throughput_section
from let_plugin.bench.page.parts import Row, Section
from let_plugin.config.errors import ConfigError, Problem

PAGE = "index.html"
_TEMPLATE = "page.html.jinja"


def write(files: Sequence[Path], out: Path) -> list[Path]:
    """Writes the page and the PNGs into the folder `out`; an older page there is replaced.

    Args:
        files: Files of rows.
        out: Made if it is missing.

    Returns:
        What was written, the page first.

    Raises:
        ConfigError: If a file is missing or holds something else than rows, if no row can be shown, or if a library is
            missing. Nothing has been written then.
    """
    problems = [
        Problem("let-bench report", f'needs {name}; pip install "let-plugin[bench]"')
        for name in ("matplotlib", "jinja2", "scipy")
        if find_spec(name) is None
    ]
    problems += [Problem("ROWS.jsonl", "no such file", str(file)) for file in files if not file.is_file()]
    if out.exists() and not out.is_dir():
        problems.append(Problem("--out", "is a file; expected a folder", str(out)))
    found: list[Row] = []
    for file in dict.fromkeys(files):
        try:
            found += rows.read(file)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    sections = make(found)
    if not sections:
        kinds = ", ".join(sorted({row["kind"] for row in found})) or "no rows at all"
        message = f"no complete pair of throughput runs, convergence run or downstream score in them ({kinds})"
        raise ConfigError(Problem("ROWS.jsonl", message, [str(file) for file in files]))
    html = render(sections, found)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / PAGE]
    written[0].write_text(html, encoding="utf-8")
    for figure in (figure for section in sections for figure in section.figures):
        written.append(out / f"{figure.name}.png")
        written[-1].write_bytes(figure.png)
    return written


def make(found: Sequence[Row]) -> list[Section]:
    """What the page shows of the rows. ConfigError lists rows that are not of their kind."""
    return [
        *convergence_section.sections([row for row in found if row["kind"] in convergence_section.KINDS]),
        *throughput_section.sections([row for row in found if row["kind"] in throughput_section.KINDS]),
        *downstream_section.sections([row for row in found if row["kind"] == downstream_section.KIND]),
    ]


def render(sections: Sequence[Section], found: Sequence[Row]) -> str:
    """The page as HTML. Everything in it is escaped, but for the drawings."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("let_plugin.bench.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {id(row) for section in sections for row in section.rows}
    return environment.get_template(_TEMPLATE).render(
        sections=sections,
        labels={"better": "better", "worse": "worse", "open": "not resolved", "note": "note"},
        num_shown=len(shown),
        num_left_out=len(found) - len(shown),
        from_time=min(row["time"] for section in sections for row in section.rows),
        to_time=max(row["time"] for section in sections for row in section.rows),
        sources=_sources(sections),
        plural=parts.plural,
    )


def _sources(sections: Sequence[Section]) -> list[dict[str, object]]:
    """Per section: the different commands, versions and, for one run of each label, its configuration."""
    sources: list[dict[str, object]] = []
    for section in sections:
        configs = {
            row.get("label", row.get("method", row.get("checkpoint", ""))): row["config"] for row in section.rows
        }
        sources.append(
            {
                "section": section,
                "commands": list(dict.fromkeys(row["command"] for row in section.rows)),
                "versions": list(
                    dict.fromkeys(", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in section.rows)
                ),
                "configs": {name: config for name, config in configs.items() if config},
            }
        )
    return sources
