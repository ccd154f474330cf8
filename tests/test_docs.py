"""README and docs/: the Python blocks run, the commands exist, and the links are valid.

A block that cannot run here has `<!-- not run: why -->` on the line above it.
"""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastnull
from fastnull.cli import parser as cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MORE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
"""Pages outside the docs: only their links and names are tested."""
LANGUAGES = {"python", "bash", "diff", "", "{eval-rst}", "{include}", "{toctree}"}
"""Allowed languages of blocks; without a name they are commands, as in reports."""
NEEDS = {
    "analyses.md": ("scipy",),
    "pretrained.md": ("matplotlib", "markdown_it", "scipy"),
    "integrations.md": ("timm", "transformers", "lightning", "accelerate", "torchvision", "peft"),
}
"""Libraries that a page's Python needs besides fastnull's requirements."""
NOT_RUN = {"installs packages": 2, "needs several processes": 1}
"""Number of blocks that are not run, by reason."""

OTHERS = ("python -m pytest benchmarks ",)
"""Beginnings of commands that are not fastnull's and are not tested."""

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+) -->\n)?```(?P<language>\S*).*\n(?P<text>(?s:.*?))^```$", re.MULTILINE
)
PARTS = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is its first line."""

    page: Path
    line: int
    language: str
    text: str
    why_not_run: str | None


def blocks_of(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    return [
        Block(page, source.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["why"])
        for found in FENCE.finditer(source)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.why_not_run is None]


def commands() -> list[tuple[str, list[str]]]:
    """Every command of the bash blocks: its place, and its words without comments and variables."""
    found = []
    for block in RUN:
        if block.language in ("bash", ""):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]
                if words:
                    found.append((f"{block.page.name}: {line}", words))
    return found


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return cli._parser()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.page == page for block in RUN if block.language == "python")],
    ids=lambda page: page.name,
)  # fmt: skip
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDS.get(page.name, ()):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}  # shared by the blocks of a page
    for block in RUN:
        if block.page == page and block.language == "python":
            # empty lines give tracebacks the line of the page
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


def test_commands_are_understood(parser: ArgumentParser) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for where, words in commands():
        program = words[0]
        if program == "torchrun":
            program, words = "fastnull", words[words.index("-m") + 1 :]
            assert words[0] == "fastnull", where
        if program == "fastnull":
            try:
                parser.parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"the command line does not understand {where}")
        elif program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:]), where
        elif not " ".join(words).startswith(OTHERS):
            pytest.fail(f"{where}: mark the block `<!-- not run: why -->`, or teach this test {program!r}")


def test_no_block_escapes() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block.page.name}:{block.line}: ```{block.language}"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        # every fence matches the pattern, and every mark belongs to a block
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks_of(page)), page.name
        assert text.count("<!-- not run") == sum(block.why_not_run is not None for block in blocks_of(page)), page.name
    reasons = [block.why_not_run for block in BLOCKS if block.why_not_run is not None]
    assert {reason: reasons.count(reason) for reason in reasons} == NOT_RUN
    shown = {(where.partition(":")[0], words[1]) for where, words in commands() if words[0] == "fastnull"}
    assert {name for page, name in shown if page == "README.md"} >= {"inspect", "finetune", "evaluate", "compare"}
    assert {name for _, name in shown} >= {"synthesize", "analyze", "report", "bench"}


def prose(page: Path) -> str:
    """The text of a page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            there = (page.parent / target.partition("#")[0]).resolve()  # the anchor is for Sphinx to check
            assert there.exists(), f"{page.name} links to {target}"
            assert there.is_relative_to(ROOT), f"{page.name} links to {target}"
            assert there.suffix != ".png" or there.stat().st_size < 300_000, f"{target} is too large"


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{PARTS})/[\w./-]*)`", prose(page)):
        if not name.startswith(("build/", "runs/")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_page_is_in_the_contents() -> None:
    listed = {DOCS / "index.md", DOCS / "api" / "index.md"}
    for index in list(listed):
        for block in blocks_of(index):
            if block.language == "{toctree}":
                lines = [line for line in block.text.splitlines() if line and not line.startswith(":")]
                listed |= {index.parent / f"{line}.md" for line in lines}
    assert listed == set(PAGES[1:])


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`~fastnull\.[\w.]+?\.?(\w+)`", text)) == set(fastnull.__all__) - {"__version__"}
    documented = set(re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in (DOCS / "api").iterdir())))
    assert documented >= {module for _, module in re.findall(r"`~((fastnull\.[\w.]+)\.\w+)`", text)}
