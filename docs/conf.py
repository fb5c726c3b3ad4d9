"""Sphinx configuration: ``python -m sphinx -W -b html docs docs/_build/html``."""

import os

os.environ.setdefault("CI", "true")  # no progress bars
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffsamp

project = "diffsamp"
author = "The diffsamp developers"
copyright = "2026, The diffsamp developers"
release = version = diffsamp.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "Thumbs.db", ".DS_Store"]
source_suffix = {".md": "markdown"}
root_doc = "index"

html_theme = "furo"
html_title = f"diffsamp {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Fields stand in the docstring's "Attributes:" section; listing them twice would be a
# duplicate object.
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# The house writes `name` for a literal; that is Markdown's meaning of the backquote.
default_role = "code"


def _skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of NamedTuples ('Alias for field number 0')."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", _skip_fields)
