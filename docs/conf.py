"""How `make docs` builds the site: Sphinx reads the Markdown of the repository where it stands.

The source directory is the root of the repository, so that links between pages, and from them to
files, are the same in the site and in the tree.
"""

import re
from typing import Any

from sphinx.application import Sphinx

from smartbird import __version__

project = "smartbird"
author = "The smartbird developers"
copyright = f"2026, {author}"
release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "README"
include_patterns = ["*.md", "csrc/*.md", "docs/**.md"]
# Nothing else is looked through.
exclude_patterns = [".*", "build", "dist", "runs", "tests", "smartbird", "benchmarks", "studies"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
# Docstrings have shapes and dtypes, and overloads would hide the names of keywords.
autodoc_typehints = "none"
napoleon_use_ivar = True
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"smartbird {release}"
html_copy_source = False
html_show_sphinx = False

# The front page is README.md, which need not look like a table of contents where it is read alone.
NAVIGATION = {
    "Use": ["concepts", "quickstart", "settings", "training", "distributed", "api"],
    "Evidence": ["language", "learning", "performance", "cuda"],
    "Develop": ["design", "../csrc/README", "../CONTRIBUTING", "../CHANGELOG"],
}


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the pages below the front page."""
    if docname != root_doc:
        return
    for caption, pages in NAVIGATION.items():
        lines = "\n".join(f"docs/{page}".replace("docs/../", "") for page in pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def escape_letters(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """A sentence of one letter, such as "K.", would begin a list."""
    lines[:] = [re.sub(r"^(.*: |\s*)([A-Z])\.$", r"\1\2\\.", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", escape_letters, priority=900)  # after napoleon
