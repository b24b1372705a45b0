"""The lines of docs/cluster.md start what they say: run by a shell, with a cluster's own programs stood in for."""

import os
import re
import subprocess
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from common.recipes import ROOT
from composer.cli import launcher

from composer_prior.options import options_of, parse_options
from composer_prior.training import launch
from composer_prior.training.config import load_recipe

PAGE = (ROOT / "docs/cluster.md").read_text()
NODES = 4
STAND_INS = {
    "composer-prior": 'printf "%s\\n" "$MASTER_ADDR" "$MASTER_PORT" "$WORLD_SIZE" "$@" > "$(mktemp "$STARTED/XXXXXX")"',
    "scontrol": f"printf 'node%s\\n' {{0..{NODES - 1}}}",
    "srun": f'for SLURM_NODEID in {{0..{NODES - 1}}}; do export SLURM_NODEID; "$@"; done',
}


def blocks(section: str, language: str) -> list[str]:
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def slurm() -> Iterator[tuple[str, dict[str, str]]]:
    (script,) = blocks("Slurm", "bash")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, flags=re.M))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == (str(NODES), "1", "8")
    yield script, {"SLURM_NNODES": options["nodes"], "SLURM_JOB_NODELIST": "node[0-3]"}


def skypilot() -> Iterator[tuple[str, dict[str, str]]]:
    task = yaml.safe_load(blocks("SkyPilot", "yaml")[0])
    name, _, gpus = task["resources"]["accelerators"].partition(":")
    assert (name, task["num_nodes"]) == ("H100", NODES)
    for node in range(NODES):
        numbers = {"SKYPILOT_NUM_NODES": str(NODES), "SKYPILOT_NUM_GPUS_PER_NODE": gpus}
        yield (
            task["run"],
            {**numbers, "SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NODE_IPS": "node0\nnode1\nnode2\nnode3"},
        )


def kubernetes() -> Iterator[tuple[str, dict[str, str]]]:
    service, job = yaml.safe_load_all(blocks("Kubernetes", "yaml")[0])
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == NODES
    assert job["spec"]["completionMode"] == "Indexed"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    for node in range(NODES):
        yield container["args"][0], {**environment, "JOB_COMPLETION_INDEX": str(node)}


@pytest.fixture
def started(tmp_path, monkeypatch) -> Any:
    """A function that runs a script and returns the environment and the words of each command that it started."""
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "started").mkdir()
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "NODE_RANK", "BASE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(script: str, environment: dict[str, str]) -> list[list[str]]:
        more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STARTED": str(tmp_path / "started")}
        subprocess.run(["bash", "-euc", script], env={**os.environ, **more, **environment}, check=True)
        lines = [file.read_text().splitlines() for file in (tmp_path / "started").iterdir()]
        for file in (tmp_path / "started").iterdir():
            file.unlink()
        return lines

    return run


@pytest.mark.parametrize(("scheduler", "first"), [(slurm, "node0"), (skypilot, "node0"), (kubernetes, "prior-0.prior")])
def test_each_node_is_launched_as_its_part_of_the_job(scheduler, first, started, monkeypatch):
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launcher, "main", launcher._parse_args)
    places = set()
    for script, environment in scheduler():
        for address, port, world_size, job, *words in started(script, environment):
            assert job == "launch"
            for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port), ("WORLD_SIZE", world_size)):
                monkeypatch.setenv(name, value)
            given = [*takewhile(lambda word: "=" in word, words)]
            _, chosen = parse_options(given, options_of(launch.launch))
            parsed = launch.launch(words[len(given) :], **chosen)
            assert (parsed.nproc, parsed.world_size, parsed.master_addr, parsed.master_port) == (8, 32, first, 7501)
            places.add((parsed.node_rank, parsed.base_rank))
            job, recipe, *changes = parsed.training_script_args
            assert job == "train"
            read = load_recipe(recipe, changes)
            assert (read.run_name, read.autoresume) == ("prior", True)
            assert read.save_folder == "s3://bucket/checkpoints/prior"
            assert read.reference["run_folder"] == "/shared/reference"
    assert places == {(node, 8 * node) for node in range(NODES)}


def test_the_launcher_has_the_options_of_the_table():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE.split("## The launcher")[1], flags=re.M)
    assert {option for option, _ in rows} <= {*options_of(launch.launch)}
    text = Path(launcher.__file__).read_text()
    assert all(f"os.environ['{variable}']" in text for _, variable in rows)
    assert len(rows) == 5
