"""The versions of either set of constraints belong together on every Python that pyproject.toml names."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def read(name: str) -> list[Requirement]:
    return [Requirement(line) for line in (ROOT / name).read_text().splitlines()]


SETS = {"constraints.txt": [], "constraints-next.txt": read("overrides-next.txt")}  # and what is asked for instead
PINS = {name: read(name) for name in SETS}
PYTHONS = ["3.11", "3.12"]
UNPINNED = {"cut-cross-entropy"}  # only for a GPU


def applies(requirement: Requirement, python: str, extra: str = "") -> bool:
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})


def pinned(constraints: str, python: str) -> dict[str, str]:
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in PINS[constraints] if applies(pin, python)}


def required(name: str, version: str) -> Iterator[Requirement]:
    """What a pinned version needs, where it is the one that is installed here."""
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        return
    if installed.version == version:
        yield from (Requirement(line) for line in installed.requires or [])


def test_the_pythons_are_those_of_the_project():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in supported] == PYTHONS


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("constraints", SETS)
def test_every_range_of_the_project_holds_its_pin(constraints, python):
    pins = pinned(constraints, python)
    assert len(pins) == len([pin for pin in PINS[constraints] if applies(pin, python)]), "a name is pinned twice"
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) in UNPINNED | {"composer-prior"} or not applies(requirement, python):
            continue
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("constraints", SETS)
def test_the_pins_satisfy_each_other_and_what_does_not_is_overridden(constraints, python):
    pins, overrides = pinned(constraints, python), {one.name: one for one in SETS[constraints]}
    checked, refused = 0, {}
    for name, version in pins.items():
        for requirement in required(name, version):
            needed = canonicalize_name(requirement.name)
            if needed in pins and applies(requirement, python):
                checked += 1
                if pins[needed] not in requirement.specifier:
                    refused[needed] = f"{name}=={version} needs {requirement}"
    assert checked > 200
    assert {*refused} == {*overrides}, refused
    assert all(pins[name] in override.specifier for name, override in overrides.items())


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("constraints", SETS)
def test_every_pin_installs_on_every_python(constraints, python):
    for name, version in pinned(constraints, python).items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if installed.version == version:
            needed = SpecifierSet(installed.metadata.get("Requires-Python") or "")
            assert f"{python}.0" in needed or python in needed, f"{name}=={version} needs Python {needed}"
