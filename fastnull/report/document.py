"""A report as a list of blocks, written as one self-contained HTML file and as Markdown with image files.

Text in blocks is Markdown without HTML.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from fastnull.record import replacing


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title of the document."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list; `kind` (good, bad or open) marks it in HTML."""

    items: Sequence[str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first `text_columns` columns are left-aligned, the others right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: int = 1


@dataclass(frozen=True)
class Code:
    """A block of commands."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A picture as an <svg> element for HTML (text in `currentColor`) and PNG bytes (on white) for Markdown.

    Attributes:
        name: of the PNG file, without suffix.
        alt: text alternative.
    """

    name: str
    svg: str = field(repr=False)
    png: bytes = field(repr=False)
    alt: str
    caption: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded behind a summary in HTML."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Bullets | Table | Code | Figure | Details

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fff; --ink: #1c2024; --soft: #5c6570; --line: #d9dee3; --panel: #f5f7f9;
  --good: #00785a; --bad: #b34700; --open: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e4e8eb; --soft: #9aa4ae; --line: #333a41;
  --panel: #1d2226; --good: #3fc79f; --bad: #f0945a; --open: #a3adb8; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif;
  max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 46rem; }
li { margin: .3rem 0; }
.table { overflow-x: auto; margin: 1rem 0; }
.table p { color: var(--soft); font-size: .88rem; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
thead th { vertical-align: bottom; white-space: normal; min-width: 5rem; border-bottom: 2px solid var(--soft); }
td:first-child { font-weight: 500; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption p { color: var(--soft); font-size: .9rem; max-width: 46rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88em; }
code { background: var(--panel); padding: .1em .3em; border-radius: 4px; }
pre { background: var(--panel); padding: .9rem 1rem; border-radius: 6px; overflow-x: auto; }
pre code { padding: 0; }
.good ul, .bad ul, .open ul { list-style: none; padding-left: 0; }
.good li, .bad li, .open li { padding-left: .9rem; border-left: 4px solid var(--open); }
.good li { border-color: var(--good); }
.bad li { border-color: var(--bad); }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--soft); }
</style>
</head>
<body>
<main>
$content
</main>
</body>
</html>
"""


def to_html(blocks: Sequence[Block]) -> str:
    """The document as one self-contained page, light and dark. Raises ImportError without markdown-it-py."""
    title = next((block.text for block in blocks if isinstance(block, Heading) and block.level == 1), "Report")
    render = _renderer()
    content = "\n".join(_html(block, render) for block in blocks)
    return Template(_PAGE).substitute(title=html.escape(title), content=content)


def to_markdown(blocks: Sequence[Block], images: str = "figures") -> str:
    """The document as GitHub's Markdown, with figures as PNG files in the folder `images`."""
    return "\n\n".join(_markdown(block, images) for block in blocks) + "\n"


def write_document(blocks: Sequence[Block], folder: Path) -> tuple[Path, Path]:
    """Write report.html, report.md and figures/*.png, each atomically; return the first two."""
    page, text = folder / "report.html", folder / "report.md"
    contents = {page: to_html(blocks), text: to_markdown(blocks)}
    for figure in _figures(blocks):
        with replacing(folder / "figures" / f"{figure.name}.png") as beside:
            beside.write_bytes(figure.png)
    for path, content in contents.items():
        with replacing(path) as beside:
            beside.write_text(content, encoding="utf-8")
    return page, text


def _figures(blocks: Sequence[Block]) -> list[Figure]:
    found = [block for block in blocks if isinstance(block, Figure)]
    return found + [figure for block in blocks if isinstance(block, Details) for figure in _figures(block.blocks)]


def _html(block: Block, render: Callable[[str], str]) -> str:
    if isinstance(block, Details):
        inside = "\n".join(_html(inner, render) for inner in block.blocks)
        return f"<details>\n<summary>{html.escape(block.summary)}</summary>\n{inside}\n</details>"
    if isinstance(block, Figure):
        svg = block.svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(block.alt)}"', 1)
        return f"<figure>\n{svg}\n<figcaption>{render(block.caption)}</figcaption>\n</figure>"
    kind = block.kind if isinstance(block, Bullets) else "table" if isinstance(block, Table) else ""
    text = render(_markdown(block, ""))
    return f'<div class="{kind}">\n{text}</div>' if kind else text


def _renderer() -> Callable[[str], str]:
    """Markdown → HTML, with HTML tags in the text escaped."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError(f"a report needs markdown-it-py: pip install fastnull[demo] ({error})") from error
    return MarkdownIt("commonmark", {"html": False}).enable("table").render


def _markdown(block: Block, images: str) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + block.text
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Bullets):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    if isinstance(block, Table):
        align = ["---" if column < block.text_columns else "---:" for column in range(len(block.header))]
        # a bar would end the cell
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (block.header, *block.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], align, *rows[1:])]
        return "\n".join(lines) + (f"\n\n{block.caption}" if block.caption else "")
    if isinstance(block, Details):
        return f"### {block.summary}\n\n" + "\n\n".join(_markdown(inner, images) for inner in block.blocks)
    alt = block.alt.replace("[", "(").replace("]", ")")
    return f"![{alt}]({images}/{block.name}.png)\n\n{block.caption}"
