"""Objects of a bucket: list, get, put, size and exists, for everything but the shards that streaming itself reads.

The clients are streaming's, so that credentials, endpoints (``S3_ENDPOINT_URL``) and kinds of store are those of the
shards. fsspec would add a second set of clients: s3fs needs aiobotocore, which needs an older botocore (aiobotocore
3.10: below 1.43.118; 1.44 is installed), its event loop does not survive the forks of a conversion, and it supports
neither streaming's ``azure-dl`` and ``alipan`` nor its environment variables.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import urlsplit

from composer_prior.data.messages import DataError
from composer_prior.data.storage import StorageError, WriteError, is_remote
from composer_prior.data.stores import PROBE, is_denied, is_final, is_missing, told

SCHEMES = ("s3", "gs", "oci", "azure", "azure-dl", "hf", "dbfs", "alipan")
_SECONDS = 60.0  # without an answer


@contextmanager
def store_errors(url: str, problem: str = ": cannot be written to") -> Iterator[None]:
    """Raise errors of stores as one line that names the URL; a missing object stays a FileNotFoundError."""
    try:
        yield
    except Exception as error:  # of the libraries of all stores
        missing = isinstance(error, FileNotFoundError) and not is_denied(error)  # Composer says so of 403, too
        if missing or isinstance(error, StorageError | WriteError | NotImplementedError):
            raise
        raise StorageError(f"{url}{problem} ({told(error, url, 200)}).") from error


class Remote:
    """A folder of a bucket, by a URL such as ``s3://bucket/folder``."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._clients: dict[tuple[int, str], Any] = {}

    def __reduce__(self) -> Any:
        return Remote, (self.url,)  # clients stay in their process

    def names(self) -> list[str]:
        """Return the names of all objects, relative to the URL, in order.

        StorageError is raised if they cannot be listed, and NotImplementedError if no store of this kind can do that.
        """
        with store_errors(self.url, ": cannot be listed"):
            client = self._client()
            path = urlsplit(self.url).path
            names = _volume_files(client, path) if self.url.startswith("dbfs:/Volumes") else client.list_objects()
            prefix = f"{path.strip('/')}/".removeprefix("/")
            return sorted(name.lstrip("/").removeprefix(prefix) for name in names or ())

    def get(
        self,
        name: str,
        file: Path,
        check: Callable[[Path], Any] = lambda file: None,
        attempts: int | None = None,
        seconds: float = _SECONDS,
    ) -> None:
        """Download an object; see :func:`.download`, or raise DataError if it is missing, or cannot be downloaded."""
        from composer_prior.data.download import ATTEMPTS, download  # here: streaming takes seconds
        from composer_prior.data.streaming_fixes import downloader_of

        url = f"{self.url}/{name}"

        def fetch(partial: Path) -> None:
            downloader = downloader_of(url)
            downloader.download(url, str(partial), min(seconds, _SECONDS))
            downloader.clean_up()

        download(fetch, file, check, attempts or ATTEMPTS, seconds, remote=url)

    def read(self, name: str, **options: Any) -> bytes:
        """Return the bytes of a small object; ``options`` and errors are those of :meth:`get`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "object")
            self.get(name, file, **options)
            return file.read_bytes()

    def put(self, folder: Path, name: str, attempts: int = 1) -> None:
        """Upload a file of a folder, with 1, 2, 4 … s between attempts, or raise StorageError if that fails."""
        with store_errors(self.url):
            client = self._client(folder)
        for attempt in range(1, attempts + 1):
            try:
                client.upload_file(name)
                return
            except Exception as error:
                if attempt == attempts or is_final(error):
                    raise StorageError(
                        f"{self.url}/{name}: the upload failed {attempt} times ({told(error, self.url, 200)}); run the "
                        "same command again to go on."
                    ) from error
            sleep(2.0 ** (attempt - 1))

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, None if there is none of this name, or raise StorageError."""
        url = urlsplit(f"{self.url}/{name}")
        with store_errors(self.url, " cannot be read"):
            try:
                return _size(self._client(), url.netloc, url.path.lstrip("/"))
            except Exception as error:
                if is_missing(error):
                    return None
                raise

    def exists(self, name: str) -> bool:
        """Return whether there is an object of a name."""
        return self.size(name) is not None

    def check_readable(self) -> None:
        """Raise StorageError if the bucket gives no access."""
        from streaming.base.storage.upload import CloudUploader  # here: conversion starts without streaming

        with store_errors(self.url, " cannot be read"), tempfile.TemporaryDirectory() as folder:
            CloudUploader.get((folder, self.url))  # which asks for the bucket

    def check_writable(self) -> None:
        """Raise StorageError if a test object cannot be written; it is removed where permitted."""
        from composer_prior.data.streaming_fixes import uploader_of  # here: conversion starts without streaming

        if self.url.startswith("hf://"):
            return  # each object is a commit there
        with store_errors(self.url), tempfile.TemporaryDirectory() as folder:
            client: Any = uploader_of(folder, self.url)
            Path(folder, PROBE).write_bytes(b"\n")
            client.upload_file(PROBE)
            bucket, key = urlsplit(self.url).netloc, urlsplit(f"{self.url}/{PROBE}").path.lstrip("/")
            with suppress(Exception):
                client.s3.delete_object(Bucket=bucket, Key=key)

    def _client(self, folder: Path | str = "") -> Any:
        """Return streaming's uploader from a folder, which also lists the bucket."""
        from composer_prior.data.streaming_fixes import uploader_of  # here: conversion starts without streaming

        key = (os.getpid(), str(folder))
        if key not in self._clients:
            with tempfile.TemporaryDirectory() as empty:
                self._clients[key] = uploader_of(empty, self.url)
            self._clients[key].local = str(folder)
        return self._clients[key]


def _size(client: Any, bucket: str, key: str) -> int | None:
    """Return the bytes of an object, asked of the client within one of streaming's uploaders."""
    if hasattr(client, "namespace"):  # Oracle's
        head = client.client.head_object(client.namespace, bucket.partition("@")[0], key)
        return int(head.headers["content-length"])
    if hasattr(client, "client"):  # Databricks'
        return client.client.files.get_metadata(f"/{key}").content_length
    store = client.s3 if hasattr(client, "s3") else client.gcs_client
    if hasattr(store, "head_object"):  # boto3's
        return store.head_object(Bucket=bucket, Key=key)["ContentLength"]
    blob = store.bucket(bucket).get_blob(key)
    return None if blob is None else blob.size


def _volume_files(client: Any, folder: str) -> Iterator[str]:
    """Yield the paths below a folder of Databricks' volumes, which streaming does not list."""
    for entry in client.client.files.list_directory_contents(folder):
        if entry.is_directory:
            yield from _volume_files(client, entry.path)
        else:
            yield entry.path


class Output:
    """A folder or remote that files are written to in ``attempts``; the folder ``state`` holds unfinished ones."""

    def __init__(self, url: str | Path, state: Path, attempts: int = 1):
        self.label = str(url).rstrip("/")
        self.remote = Remote(self.label) if is_remote(url) else None
        self.folder = None if self.remote else Path(url)
        self.state = state
        self.attempts = attempts

    def publish(self, folder: Path, names: Sequence[str]) -> None:
        """Move finished files from a local folder to the output."""
        for name in names:
            if self.remote is None:
                os.replace(folder / name, Path(self.label, name))
            else:
                self.remote.put(folder, name, self.attempts)
                (folder / name).unlink(missing_ok=True)

    def names(self) -> set[str] | None:
        """Return the names of the files in the output, or None where a remote cannot list them."""
        if self.remote is None:
            return set(os.listdir(self.label))
        try:
            return {name.rpartition("/")[2] for name in self.remote.names()} - {PROBE}
        except (NotImplementedError, FileNotFoundError):
            return None

    def read(self, name: str, names: set[str] | None) -> bytes | None:
        """Return one small file of the output, or None if it is not there; ``names`` are those of :meth:`names`."""
        if names is not None and name not in names:
            return None
        if self.remote is None:
            path = Path(self.label, name)
            return path.read_bytes() if path.exists() else None
        try:
            return self.remote.read(name, attempts=1 if names is None else self.attempts)
        except DataError as error:
            if names is not None or is_denied(error):
                raise StorageError(f"{self.label}/{name} cannot be read: {error}.") from error
            return None  # errors for missing files differ between remotes
