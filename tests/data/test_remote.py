"""Objects of a bucket: what stores of each kind are asked, and that an object which is missing is no error."""

import pickle
from types import SimpleNamespace

import pytest
from common.s3_server import s3_server

from composer_prior.data.messages import DataError
from composer_prior.data.remote import Output, Remote

pytest.importorskip("moto")


class NotFound(Exception):
    """As Google's and Databricks' clients call it."""


class ServiceError(Exception):
    """As Oracle's client calls it."""

    status, code = 404, "ObjectNotFound"


def find(key):
    if not key.endswith("there"):
        raise NotFound(key)
    return SimpleNamespace(content_length=3)


def head(namespace, bucket, key):
    if key != "folder/there":
        raise ServiceError
    assert (namespace, bucket) == ("tenancy", "b")
    return SimpleNamespace(headers={"content-length": "3"})


def list_volume(folder):
    below = {"/Volumes/b": ["folder", "there"], "/Volumes/b/folder": ["there"]}[folder]
    return [SimpleNamespace(path=f"{folder}/{name}", is_directory=name == "folder") for name in below]


BLOBS = SimpleNamespace(get_blob=lambda key: SimpleNamespace(size=3) if key == "folder/there" else None)
STORES = {
    "gs://b/folder": SimpleNamespace(gcs_client=SimpleNamespace(bucket=lambda name: BLOBS)),
    "oci://b@tenancy/folder": SimpleNamespace(namespace="tenancy", client=SimpleNamespace(head_object=head)),
    "dbfs:/Volumes/b": SimpleNamespace(
        client=SimpleNamespace(files=SimpleNamespace(get_metadata=find, list_directory_contents=list_volume))
    ),
}


@pytest.fixture(scope="module")
def bucket():
    with s3_server("objects") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


def test_objects_are_put_listed_measured_and_got(bucket, tmp_path):
    remote = Remote("s3://objects/folder/")
    for folder, name, data in (("a", "one", b"1"), ("b", "two", b"22"), ("a", "three", b"")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(data)
        remote.put(tmp_path / folder, name)
    Remote("s3://objects/folder/below").put(tmp_path / "a", "one")
    Remote("s3://objects/folder-beside").put(tmp_path / "a", "one")
    assert remote.names() == ["below/one", "one", "three", "two"]
    assert "folder/two" in Remote("s3://objects").names()
    assert [remote.size(name) for name in ("one", "two", "three", "four")] == [1, 2, 0, None]
    assert remote.exists("three")
    assert not remote.exists("four")
    pickle.loads(pickle.dumps(remote)).get("two", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == b"22"
    with pytest.raises(DataError, match="not found"):
        remote.get("four", tmp_path / "four")
    assert Output("s3://objects/folder", tmp_path).read("four", None) is None


@pytest.mark.parametrize("url", STORES)
def test_each_kind_of_store_tells_sizes(url, monkeypatch):
    remote = Remote(url)
    monkeypatch.setattr(remote, "_client", lambda: STORES[url])
    assert remote.size("there") == 3
    assert remote.size("elsewhere") is None


def test_a_volume_is_listed_with_its_folders(monkeypatch):
    remote = Remote("dbfs:/Volumes/b")
    monkeypatch.setattr(remote, "_client", lambda: STORES["dbfs:/Volumes/b"])
    assert remote.names() == ["folder/there", "there"]
