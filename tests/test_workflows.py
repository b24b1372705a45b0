"""The workflows of GitHub call the Makefile and nothing else; the container is what it says."""

import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

import composer_prior

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


@pytest.mark.parametrize("name", ["test", "release"])
def test_steps_are_targets_of_the_makefile(name):
    jobs = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"]
    run = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert run
    assert {tuple(line.split(" ")) for line in run} <= {("make", target) for target in TARGETS}


def test_the_matrix_has_the_versions_of_pyproject():
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert 'requires-python = ">=3.11,<3.13"' in (ROOT / "pyproject.toml").read_text()
    assert matrix["python"] == ["3.11", "3.12"]


@pytest.mark.parametrize(("tag", "status"), [(f"v{composer_prior.__version__}", 0), ("v9.9.9", 2), ("v0", 2)])
def test_a_tag_has_to_be_the_version(tag, status):
    command = ["make", "tagged", "GITHUB_REF_TYPE=tag", f"GITHUB_REF_NAME={tag}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == status
    assert (f"The tag {tag} is not v and __version__" in found.stdout) == bool(status)


def test_the_container_has_no_finding():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    (extras,) = re.findall(r"--build-arg EXTRAS=(\S+)", (ROOT / "Dockerfile").read_text())
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*extras.split(",")} <= {*known}
