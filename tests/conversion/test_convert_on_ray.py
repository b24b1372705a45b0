"""Conversion on a Ray cluster of two nodes on loopback: what it leaves is what processes leave."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from common.commands import convert as main
from common.ray_cluster import ray_cluster
from common.s3_server import s3_server
from PIL import Image

from composer_prior.conversion.convert import convert_captions

pytestmark = pytest.mark.slow

pytest.importorskip("ray")
boto3 = pytest.importorskip("boto3")

ROOT = Path(__file__).parents[2]
OF_RAY = re.compile(r"(\x1b\[\d+m)?\(|.*\t(INFO|WARNING|ERROR) ")  # from another process, or from its own logger
OPTIONS = {"unit_samples": 25, "size_limit": "1mb", "check": "full", "max_rejected": 0.2}


def jpeg(seed: int, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(side * side * 3)).save(buffer, "JPEG")
    return buffer.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 500 images with captions, one in twenty of them bad; the first two units take a while."""
    folder, large = tmp_path_factory.mktemp("source"), jpeg(0, side=700)
    with open(folder / "captions.jsonl", "w") as lines:
        for number in range(500):
            (folder / f"{number}.jpg").write_bytes(
                b"bad" if number % 20 == 0 else large if number < 50 else jpeg(number)
            )
            lines.write(json.dumps({"image": f"{number}.jpg", "caption": f"picture {number}"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What processes leave."""
    out = tmp_path_factory.mktemp("whole")
    summary = convert_captions(source, out, processes=1, **OPTIONS)
    assert (summary.samples, summary.reasons) == (475, {"undecodable image": 25})
    return contents(out)


class Cluster:
    """The commands of drivers of a cluster whose nodes work in folders of their own."""

    def __init__(self, folders: list[Path], environment: dict[str, str], bucket: Any):
        self.folders = folders
        self.environment = {**os.environ, **environment}
        self.bucket = bucket

    def start(self, source: object, out: object, **options: Any) -> "subprocess.Popen[str]":
        words = [f"{key}={value}" for key, value in {**OPTIONS, "distributor": "ray", **options}.items()]
        command = [sys.executable, "-m", "composer_prior", "convert", str(source), str(out), *words]
        outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment, cwd=self.folders[0], **outputs)

    def convert(self, source: object, out: object, status: int = 0, **options: Any) -> tuple[str, list[str]]:
        """What a conversion prints, and its lines of errors: those that Ray itself prints are none."""
        return self.end(self.start(source, out, **options), status)

    def end(self, driver: "subprocess.Popen[str]", status: int) -> tuple[str, list[str]]:
        output, errors = driver.communicate(timeout=400)
        assert driver.returncode == status, output + errors
        return output, [line for line in errors.splitlines() if not OF_RAY.match(line)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folders = [tmp_path_factory.mktemp(f"node{number}") for number in range(2)]
    with s3_server("captions") as bucket, ray_cluster(folders, **bucket) as environment:
        resource = boto3.resource(
            "s3",
            endpoint_url=bucket["S3_ENDPOINT_URL"],
            aws_access_key_id=bucket["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=bucket["AWS_SECRET_ACCESS_KEY"],
        )
        yield Cluster(folders, environment, resource.Bucket("captions"))


def wait_for(found: Callable[[], Any], driver: "subprocess.Popen[str]") -> Any:
    """What is found first, while a driver runs."""
    while not (result := found()):
        assert driver.poll() is None, "it ended before"
        time.sleep(0.001)
    return result


def workers(out: Path) -> set[int]:
    """The processes that have begun a unit."""
    folders = (out / ".convert").glob("tmp*@*")
    return {int(folder.name.removeprefix("tmp").partition("@")[0]) for folder in folders}


def test_the_output_is_that_of_processes_and_another_call_does_nothing(cluster, source, whole, tmp_path):
    output, errors = cluster.convert(source, tmp_path / "out")
    assert "500 captions read, 475 written" in output
    assert "25 undecodable image" in output
    assert errors == []
    assert contents(tmp_path / "out") == whole
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    convert_captions(source, tmp_path / "out", **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_a_unit_whose_process_is_killed_is_tried_again(cluster, source, whole, tmp_path):
    out = tmp_path / "out"
    driver = cluster.start(source, out)
    killed = min(wait_for(lambda: workers(out), driver))
    os.kill(killed, signal.SIGKILL)
    assert not [*(out / ".convert/units").iterdir()], "it was in the middle of its first"
    wait_for(lambda: workers(out) - {killed}, driver)
    output, _ = cluster.end(driver, 0)
    assert "500 captions read, 475 written" in output
    assert contents(out) == whole


def test_a_driver_that_is_killed_goes_on_when_it_is_started_again(cluster, source, whole, tmp_path):
    out = tmp_path / "out"
    driver = cluster.start(source, out)
    wait_for(lambda: len([*(out / ".convert/units").glob("*.json")]) >= 4, driver)
    driver.kill()
    driver.communicate()
    assert not (out / "index.json").exists()
    units = [json.loads(file.read_bytes()) for file in (out / ".convert/units").glob("*.json")]
    shards = [out / shard["raw_data"]["basename"] for unit in units for shard in unit["shards"]]
    first = {shard: shard.stat().st_mtime_ns for shard in shards}
    output, errors = cluster.convert(source, out)
    assert "500 captions read, 475 written" in output
    assert errors == []
    assert contents(out) == whole
    assert {shard: shard.stat().st_mtime_ns for shard in shards} == first, "what was done is not done again"


def test_the_bucket_holds_what_a_folder_would(cluster, source, whole):
    cluster.convert(source, "s3://captions/same", work=cluster.folders[0] / "work")
    found = cluster.bucket.objects.filter(Prefix="same/")
    assert {item.key.removeprefix("same/"): item.get()["Body"].read() for item in found} == whole


def test_a_node_that_does_not_see_the_output_is_told_before_anything_is_converted(cluster, source):
    """A path that leads each process into its own working folder is another place on each node."""
    out = Path("/proc/self/cwd/out")
    _, (line,) = cluster.convert(source, out, status=1)
    assert line.startswith(f"error: {out}: not seen by the node ")
    assert not [*cluster.folders[1].iterdir()]
    assert not [*cluster.folders[0].rglob("*.mds")]


def test_a_node_with_another_version_is_told(cluster, source, tmp_path, monkeypatch):
    (tmp_path / "other/composer_prior/conversion").mkdir(parents=True)
    for package in ("composer_prior", "composer_prior/conversion"):
        (tmp_path / "other" / package / "__init__.py").touch()
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": str(tmp_path / "other")}}}
    monkeypatch.setitem(cluster.environment, "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    _, errors = cluster.convert(source, tmp_path / "out", status=1)
    beginning = "error: distributor=ray: a node of the cluster cannot take part (ModuleNotFoundError: "
    assert errors[-1].startswith(beginning), errors  # behind a traceback of Ray's


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster_is_told_in_one_line(address, cluster, source, tmp_path, monkeypatch):
    monkeypatch.setitem(cluster.environment, "RAY_ADDRESS", address)
    _, (line,) = cluster.convert(source, tmp_path / "out", status=1)
    assert line.startswith("error: distributor=ray: no cluster to be had (")


def test_an_error_in_a_unit_is_the_line_that_processes_would_print(cluster, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(8):
        archive = tmp_path / f"in/{number}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for index in range(20):
                for suffix, data in (("jpg", jpeg(index)), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{index:04}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        if number >= 4:
            archive.write_bytes(archive.read_bytes()[:20_000])
    _, (ours,) = cluster.convert(tmp_path / "in", tmp_path / "ray", 1)
    _, (theirs,) = cluster.convert(tmp_path / "in", tmp_path / "processes", 1, distributor="processes", processes=1)
    assert theirs.startswith("error: 4.tar.gz cannot be read, or not to its end: ")
    assert re.sub("^error: [4-7]", "error: 4", ours) == theirs


@pytest.mark.parametrize("name", ["in", "out/.convert"])
def test_storage_that_is_gone_is_one_line(cluster, source, name, tmp_path):
    shutil.copytree(source, tmp_path / "in")
    driver = cluster.start(tmp_path / "in", tmp_path / "out")
    wait_for(lambda: [*(tmp_path / "out/.convert/units").glob("*.json")], driver)
    (tmp_path / name).rename(tmp_path / "gone")
    _, errors = cluster.end(driver, 1)
    assert [line[:7] for line in errors] == ["error: "], errors
    assert str(tmp_path / name.partition("/")[0]) in errors[0]


def test_without_the_package_the_extra_is_named(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([str(source), str(tmp_path / "out"), "distributor=ray"]) == 1
    assert capsys.readouterr().err == (
        "error: distributor=ray needs the package ray: pip install 'composer-prior[ray]'.\n"
    )
    assert not (tmp_path / "out").exists()
