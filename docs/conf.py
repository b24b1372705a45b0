"""Configuration of Sphinx. Its source folder is the repository, so that links between pages work there as on GitHub."""

import os
import sys
from pathlib import Path

from composer_prior import __version__

project = "composer-prior"
author = "the composer-prior authors"
release = __version__

os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for the commands whose help is shown

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.programoutput",
]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/*.rst",
    "docs/api/*.rst",
    "docs/evidence/study.md",
    "docs/evidence/*/study.md",
    "composer_prior/algorithms/*/README.md",
]
apidoc_modules = [
    {
        "path": "../composer_prior",
        "exclude_patterns": ["../composer_prior/inference/lmms_eval_plugin.py"],  # it needs lmms-eval
        "destination": "docs/api",
        "separate_modules": True,
        "module_first": True,
    }
]
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
autodoc_default_options = {"ignore-module-all": True}  # what a package takes from its modules is shown there
# Inventories of other projects are on the network, which a build does without.
_OTHERS = "abc|collections|composer|optional|streaming|torch|torchmetrics|torchvision|transformers|typing"
nitpick_ignore_regex = [("py:.*", rf"({_OTHERS})(\..*)?"), ("py:class", r".*\._\w+")]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
