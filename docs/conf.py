"""Sphinx's settings: ``sphinx-build -W docs build/docs`` makes the site, and every warning is an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Nothing is asked of the model hub while the package is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

import flair_peft  # noqa: E402

project = "flair_peft"
author = "the flair_peft developers"
version = release = flair_peft.__version__
html_title = f"flair_peft {release}"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "repository",
    "docstrings",
]
exclude_patterns = ["extensions"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks show what they printed when they were committed

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["ray"]  # half a gigabyte, for the signature of one function
autodoc_typehints = "none"  # docstrings say what is meant; signatures with all types fill the screen
napoleon_include_init_with_doc = False

# A reference to a name of this package has to resolve; those to other libraries are looked up nowhere.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!flair_peft\b|~?flair_peft\b|\w+Error$).*"), ("py:exc", r"(Key|Type|Value)Error")]

# "…" in a snippet stands for code that the reader has.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "pydata_sphinx_theme"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "flair_peft"},
    "navbar_end": ["theme-switcher"],
    "navbar_align": "left",
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
html_sidebars = {"index": []}
copyright = "the flair_peft developers, MIT licence"
