"""Sphinx's settings."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "clawtrio"
author = "the clawtrio developers"
version = release = version_of("clawtrio")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinxcontrib_trio",
]
# What the benchmarks wrote; a page includes it.
exclude_patterns = ["bench/*.md"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 2
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_rtype = False
# Links to other projects' documentation need a network, which a build must not.
intersphinx_mapping: dict[str, tuple[str, None]] = {}
