"""Sphinx: the pages of this folder, and the API reference out of the docstrings. `make docs` builds build/docs."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from fastnull import __version__

project = "fastnull"
copyright = "the fastnull developers"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"fastnull {release}"
html_static_path = ["_static"]
html_css_files = ["fastnull.css"]
html_math_renderer = "mathml"
pygments_style = "default"
pygments_dark_style = "monokai"

# $...$ and $$...$$ are formulas, as on GitHub
myst_enable_extensions = ["dollarmath", "amsmath"]
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


def visit_formula(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML, which browsers draw by themselves: no script, and nothing loaded from a network."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="formula">{formula}</div>\n' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_formula, None))
    app.connect("autodoc-process-docstring", keep_indented_lines)
