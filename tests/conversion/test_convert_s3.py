"""Conversion to a bucket: a real S3 API on loopback, served by the script that users try buckets with."""

import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from common.commands import convert as main
from common.fault_proxy import Fault, FaultProxy
from common.s3_server import s3_server, started
from PIL import Image
from streaming import StreamingDataset

from composer_prior.conversion.convert import ConversionError, convert_captions
from composer_prior.conversion.sources import SourceError
from composer_prior.reports.inspection import inspect_captions

pytest.importorskip("moto")
boto3 = pytest.importorskip("boto3")

SCRIPTS = Path(__file__).parents[2] / "scripts"


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server("captions") as environment:
        yield environment


@pytest.fixture
def bucket(server, monkeypatch, tmp_path) -> Any:
    for name, value in {**server, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return boto3.resource("s3", endpoint_url=server["S3_ENDPOINT_URL"]).Bucket("captions")


def objects(bucket: Any, prefix: str) -> dict[str, bytes]:
    found = bucket.objects.filter(Prefix=f"{prefix}/")
    return {item.key.removeprefix(f"{prefix}/"): item.get()["Body"].read() for item in found}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    with open(folder / "captions.jsonl", "w") as lines:
        for number in range(120):
            (folder / f"{number}.jpg").write_bytes(jpeg() if number % 40 else b"bad")
            lines.write(json.dumps({"image": f"{number}.jpg", "caption": f"picture {number}"}) + "\n")
    return folder


def test_the_bucket_holds_what_a_folder_would(bucket, source, tmp_path):
    summary = convert_captions(source, "s3://captions/same", unit_samples=30, size_limit="4kb", processes=2)
    convert_captions(source, tmp_path / "out", unit_samples=30, size_limit="4kb")
    assert objects(bucket, "same") == files(tmp_path / "out")
    last = max(bucket.objects.filter(Prefix="same/"), key=lambda item: item.last_modified)
    assert last.last_modified == bucket.Object("same/index.json").last_modified
    assert not list((tmp_path / "cache").rglob("*.mds")), "nothing is left behind"
    # Complete: a second call, also from a machine that knows nothing of the first, does nothing.
    before = {item.key: item.last_modified for item in bucket.objects.filter(Prefix="same/")}
    assert convert_captions(source, "s3://captions/same", unit_samples=30, size_limit="4kb") == summary
    assert {item.key: item.last_modified for item in bucket.objects.filter(Prefix="same/")} == before
    with pytest.raises(ConversionError, match="s3://captions/same: begun with captions=all"):
        convert_captions(source, "s3://captions/same", captions="sample", unit_samples=30, size_limit="4kb")


def test_streaming_reads_it_with_validated_hashes(bucket, source, tmp_path):
    convert_captions(source, "s3://captions/read/", size_limit="4kb", processes=1)
    data = StreamingDataset(
        local=str(tmp_path / "local"),
        remote="s3://captions/read",
        batch_size=1,
        shuffle=False,
        validate_hash="xxh64",
    )
    assert [data[number]["caption"] for number in range(len(data))] == [f"picture {n}" for n in range(120) if n % 40]
    assert data[0]["image"] == jpeg()
    del data
    report = inspect_captions("s3://captions/read", page=tmp_path / "page.html")
    assert (report.samples, report.undecodable) == (117, 0)


@pytest.mark.slow
def test_killed_and_resumed_the_bucket_is_the_same(bucket, source, tmp_path):
    options = ["unit_samples=4", "size_limit=2kb", "check=full"]
    assert main([str(source), str(tmp_path / "out"), *options, "processes=1"]) == 0
    command, moments, kills = [str(source), "s3://captions/killed", *options, "processes=2"], random.Random(0), 0
    for goal in (2, 14):
        running = get_context("fork").Process(target=main, args=(command,))
        running.start()
        while running.is_alive() and len(list(tmp_path.glob("cache/composer-prior/convert/*/units/*.json"))) < goal:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        kills += running.is_alive()
        running.kill()
        running.join()
    assert kills
    assert "index.json" not in objects(bucket, "killed")
    # What the bucket has lost meanwhile is uploaded again.
    next(iter(bucket.objects.filter(Prefix="killed/shard."))).delete()
    assert main(command) == 0
    assert objects(bucket, "killed") == files(tmp_path / "out")


def upload(bucket: Any, folder: Path, prefix: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.upload_file(str(path), f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://captions/{prefix}"


@pytest.fixture
def tars(tmp_path) -> Path:
    """Tar shards in two folders, one of them broken, with what img2dataset leaves beside them."""
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "tars"
    for number, name in enumerate(("a/00000.tar", "a/00001.tar", "b/00000.tar")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(str(folder / name)) as tar:
            for index in range(20):
                tar.write(
                    {"__key__": f"{number}{index:04}", "jpg": jpeg() if index else b"bad", "txt": f"{name} {index}"}
                )
    (folder / "a/00000.parquet").write_bytes(b"metadata")
    (folder / "a/00001.tar").write_bytes((folder / "a/00001.tar").read_bytes()[:-12_000])
    return folder


@pytest.mark.slow
def test_tar_shards_in_a_bucket_are_read_as_those_in_a_folder(bucket, tars, server, tmp_path, monkeypatch):
    remote = upload(bucket, tars, "tars")
    options = {"max_rejected": 0.5, "size_limit": "8kb"}
    for source in (str(tars), remote):
        with pytest.raises((SourceError, ConversionError), match=r"a/00001\.tar.*on_bad_file=skip"):
            convert_captions(source, tmp_path / f"refused{len(source)}", processes=1, **options)
    options["on_bad_file"] = "skip"
    summary = convert_captions(tars, tmp_path / "local", processes=1, **options)
    assert summary.reasons == {"broken archive": 1, "missing caption": 1, "undecodable image": 3}
    assert (summary.samples, summary.estimated) == (56, 1), "at least one is lost in a file that was cut"

    def plan(path: str, n: int) -> Fault | None:
        return (Fault(status=503), Fault(cut=True), Fault(gone=0.3), None)[min(n, 3)] if path.endswith(".tar") else None

    monkeypatch.setattr("composer_prior.data.download.FIRST_PAUSE", 0.1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # only our own attempts
    assert convert_captions(remote, tmp_path / "parallel", processes=2, **options) == summary
    with FaultProxy(server["S3_ENDPOINT_URL"], plan) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.address)
        # In one process: a forked one would hold the proxy's port open while it is gone.
        assert convert_captions(remote, tmp_path / "remote", processes=1, **options) == summary
        monkeypatch.setenv("S3_ENDPOINT_URL", server["S3_ENDPOINT_URL"])
    assert sum(proxy.injected.values()) == 9
    assert files(tmp_path / "parallel") == files(tmp_path / "remote")
    local, read = files(tmp_path / "local"), files(tmp_path / "remote")
    assert {**read, "conversion.json": b"", "rejected.jsonl": b""} == {
        **local,
        "conversion.json": b"",
        "rejected.jsonl": b"",
    }
    sources = [[json.loads(line)["source"] for line in f["rejected.jsonl"].splitlines()] for f in (local, read)]
    assert sources[0] == sources[1]
    assert convert_captions(f"{remote}/b/00000.tar", tmp_path / "one", processes=1).samples == 19


def test_parquet_files_in_a_bucket(bucket, tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "parquet").mkdir()
    for number in range(2):
        table = arrow.table({"image": [jpeg()] * 5, "text": [f"picture {number} {row}" for row in range(5)]})
        parquet.write_table(table, tmp_path / f"parquet/{number}.parquet", row_group_size=2)
    (tmp_path / "parquet/2.parquet").write_bytes(b"damaged")
    remote = upload(bucket, tmp_path / "parquet", "parquet")
    with pytest.raises(ConversionError, match=r"2\.parquet cannot be read.*not a Parquet file"):
        convert_captions(remote, tmp_path / "out", processes=1)
    summary = convert_captions(remote, tmp_path / "out", processes=1, on_bad_file="skip", max_rejected=0.4)
    assert (summary.samples, summary.reasons, summary.estimated) == (10, {"unreadable file": 5}, 5)
    line = json.loads((tmp_path / "out/rejected.jsonl").read_text())
    assert (line["id"], line["source"]) == ("2.parquet", "2.parquet")
    assert str(tmp_path) not in line["detail"]


@pytest.mark.slow
def test_the_first_files_of_a_bucket_may_be_bad(bucket, tars, tmp_path):
    (tars / "a/00000.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    remote = upload(bucket, tars, "first")
    with pytest.raises(SourceError, match=r"first: a file cannot be read: a/00000\.tar \(a Git LFS pointer"):
        convert_captions(remote, tmp_path / "out", processes=2)
    summary = convert_captions(remote, tmp_path / "out", processes=2, on_bad_file="skip", max_rejected=0.9)
    assert (summary.samples, summary.reasons["broken archive"], summary.estimated) == (37, 20 + 1, 20 + 1)
    with pytest.raises(SourceError, match=r"none of its 1 files can be read: 00000\.tar \(a Git LFS pointer"):
        convert_captions(f"{remote}/a/00000.tar", tmp_path / "one", processes=1)


def test_a_file_in_a_bucket_names_no_images_of_this_machine_unasked(bucket, tmp_path, monkeypatch):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "own.jpg").write_bytes(jpeg())
    (tmp_path / "paths").mkdir()
    parquet.write_table(arrow.table({"image": ["own.jpg"], "text": ["mine"]}), tmp_path / "paths/0.parquet")
    remote = upload(bucket, tmp_path / "paths", "paths")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="1 missing file"):
        convert_captions(remote, tmp_path / "out", processes=1)
    assert convert_captions(remote, tmp_path / "asked", processes=1, images=str(tmp_path)).samples == 1


@pytest.mark.slow
def test_a_remote_source_that_cannot_be_read_is_named_in_one_line(bucket, source, tars, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("composer_prior.data.download.FIRST_PAUSE", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    lists, both = upload(bucket, source, "lists"), upload(bucket, tars, "both")
    bucket.put_object(Key="both/other.parquet", Body=b"")
    out = str(tmp_path / "out")
    messages = {
        lists: "no .tar or .parquet found here. Of a remote, these two are read; copy other formats to a disk first.",
        both: "it holds webdataset and parquet, choose with form=.",
        "s3://no-such-bucket/x": "s3://no-such-bucket/x cannot be listed: ",
        "s3://captions/none/0.tar": "cannot be read: Object s3://captions/none/0.tar not found",
        "ftp://host/x": "ftp://host/x cannot be listed: ",
    }
    for remote, message in messages.items():
        assert main([remote, out]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert len(error.splitlines()) == 1
    assert main([both, out, "form=webdataset", "max_rejected=0.5", "on_bad_file=skip"]) == 0


def test_too_many_rejected_leave_the_list_and_no_index(bucket, source):
    with pytest.raises(ConversionError, match="s3://captions/bad: 3 of 120 captions were rejected"):
        convert_captions(source, "s3://captions/bad", max_rejected=0.01, processes=1)
    found = objects(bucket, "bad")
    assert len(found["rejected.jsonl"].splitlines()) == 3
    assert "index.json" not in found


def test_a_bucket_that_fails_is_named_in_one_line(bucket, source, capsys, monkeypatch):
    assert main([str(source), "s3://no-such-bucket/x"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: s3://no-such-bucket/x: cannot be listed")
    bucket.put_object(Key="foreign/index.json", Body=b"{}")
    assert main([str(source), "s3://captions/foreign"]) == 1
    assert "s3://captions/foreign: holds something else (index.json)" in capsys.readouterr().err
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert main([str(source), "s3://captions/x"]) == 1
    assert "s3://captions/x: cannot be listed" in capsys.readouterr().err


def test_the_server_ends_when_it_is_told():
    server, _ = started("bucket=own")
    try:
        server.terminate()
        server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0


def test_the_server_ends_with_its_parent():
    code = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, {str(SCRIPTS / 'local_s3.py')!r}]); "
    parent = subprocess.Popen([sys.executable, "-c", code + "print(p.pid, flush=True); time.sleep(60)"],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not parent.stdout.readline().startswith("# s3://"):
        pass
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_credentials_stay_out_of_what_is_written(bucket, source, server):
    convert_captions(source, "s3://captions/secret", processes=1)
    written = b"".join(objects(bucket, "secret").values())
    assert os.environ["S3_ENDPOINT_URL"].encode() not in written
    assert b"AWS" not in written


def test_the_folder_of_the_state_keeps_what_lies_there(bucket, source, tmp_path):
    work = tmp_path / "work"
    (work / "units").mkdir(parents=True)
    (work / "units/mine.txt").write_text("mine")
    convert_captions(source, "s3://captions/beside", processes=1, work=str(work))
    assert "index.json" in objects(bucket, "beside")
    assert [path.relative_to(work) for path in sorted(work.rglob("*"))] == [Path("units"), Path("units/mine.txt")]
