"""The reference pages of the documentation name all commands and all public names."""

import re

from common.recipes import ROOT

import composer_prior
from composer_prior.commands.cli import JOBS


def test_every_command_shows_its_help():
    page = (ROOT / "docs/commands.md").read_text()
    assert re.findall(r"command-output} composer-prior (\w+) --help", page) == [*JOBS]
    assert re.findall(r"^## (\w+)$", page, flags=re.M) == [*JOBS]


def test_every_public_name_has_its_place():
    named = re.findall(r"`composer_prior\.(\w+) <([\w.]+)>`", (ROOT / "docs/python.rst").read_text())
    assert dict(named) == {name: f"{module}.{name}" for name, module in composer_prior._MODULES.items()}
    assert sorted(name for name, _ in named) == sorted(composer_prior.__all__)
