"""Sphinx: the pages of this folder, and the API reference out of the docstrings. `make docs` builds build/docs."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

from fastnull import __version__

project = "fastnull"
copyright = "the fastnull developers"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1200px", "sidebar_width": "240px", "fixed_sidebar": True}

# headings get the anchors that GitHub gives them
myst_heading_anchors = 3

# docstrings write `name` as Markdown does
default_role = "literal"
napoleon_numpy_docstring = False
# attributes as a list of the class, without entries of their own in the index and the sidebar
napoleon_use_ivar = True
autodoc_member_order = "bysource"
# defaults as they are written: 8 / 255, not 0.03137254901960784
autodoc_preserve_defaults = True


def keep_indented_lines(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Indented lines of a module's docstring are code, formulas or columns, which reST would run together."""
    if what == "module":
        lines[:] = re.sub(r"^(\S.*)\n+(?= {4})", r"\1\n\n::\n\n", "\n".join(lines), flags=re.MULTILINE).split("\n")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_indented_lines)
