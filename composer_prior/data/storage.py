"""Where files go: folders and remotes, one writer at a time, and what is written is whole or not there."""

import errno
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import psutil

from composer_prior.data.messages import DataError, OneLineError
from composer_prior.data.stores import PROBE, is_denied, is_final, told

MARK = ".composer-prior.json"  # in a folder: the names of what this program wrote there
_FULL = re.compile(
    rf"(?:os error|\[Errno) ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b"
    r"|No space left on device|unexpected pos \d+|PytorchStreamWriter failed"
)
REMOTES = ("s3", "gs", "oci", "azure", "azure-dl", "hf", "dbfs", "alipan")


class StorageError(OneLineError, RuntimeError):
    """A place that cannot be written to, or not be read."""


class WriteError(OneLineError, OSError):
    """A place that nothing can be written to, or whose disk is full."""


def is_remote(path: str | Path) -> bool:
    """Whether a path names a remote of streaming rather than a file or folder of this machine."""
    return "://" in str(path) or str(path).startswith("dbfs:")


def list_remote(remote: str) -> list[str]:
    """The addresses of all objects below a remote's.

    Raises:
        StorageError: if it cannot be listed.
    """
    with telling(remote, ": cannot be listed"), tempfile.TemporaryDirectory() as empty:
        names = uploader_of(remote, empty).list_objects()
    root = "/".join(remote.split("/")[:3])
    return [name if is_remote(name) else f"{root}/{name}" for name in names or ()]


def uploader_of(remote: str, empty: str) -> Any:
    """Streaming's uploader to a remote, which asks it for the bucket; also what lists it."""
    from streaming.base.storage.upload import CloudUploader  # here: conversion starts without streaming

    return CloudUploader.get((empty, remote.rstrip("/")), keep_local=True, retry=1)


@contextmanager
def telling(remote: str, what: str = ": cannot be written to") -> Iterator[None]:
    """Let what goes wrong with a remote be one line that names it; an object that is missing stays what it is.

    Args:
        remote: its address.
        what: words for it.
    """
    try:
        yield
    except Exception as error:  # of the libraries of all stores
        missing = isinstance(error, FileNotFoundError) and not is_denied(error)  # Composer says so of 403, too
        if missing or isinstance(error, StorageError | WriteError | NotImplementedError):
            raise
        raise StorageError(f"{remote}{what} ({told(error, remote, 200)}).") from error


def check_readable(remote: str) -> None:
    """Refuse a remote whose bucket gives no access.

    Raises:
        StorageError: naming it.
    """
    with telling(remote, " cannot be read"), tempfile.TemporaryDirectory() as empty:
        uploader_of(remote, empty)


def check_writable(remote: str) -> None:
    """Refuse a remote that cannot be written to; the object that tries it is removed where that is permitted.

    Raises:
        StorageError: naming it.
    """
    if remote.startswith("hf://"):
        return  # each object is a commit there
    with telling(remote), tempfile.TemporaryDirectory() as folder:
        uploader = uploader_of(remote, folder)
        Path(folder, PROBE).write_bytes(b"\n")
        uploader.upload_file(PROBE)
        remove_probe(getattr(uploader, "s3", None), remote)


def remove_probe(client: Any, remote: str) -> None:
    """Remove what was written to try a remote, where its client is boto3's."""
    bucket, _, key = remote.partition("://")[2].strip("/").partition("/")
    with suppress(Exception):
        client.delete_object(Bucket=bucket, Key=f"{key}/{PROBE}".lstrip("/"))


@contextmanager
def full_disk_told(place: str | Path, size: int | None = None, remedy: str = "") -> Iterator[None]:
    """Let a full disk be one line that names a place, the bytes to be written there and those that are free."""
    try:
        yield
    except BaseException as error:  # torch's on sharded checkpoints is no Exception
        chain = [error]
        while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
            chain.append(below)
        told = [match for one in chain if (match := _FULL.search(f"[Errno {getattr(one, 'errno', None)}] {one}"))]
        elsewhere = any("</torch_" in str(one) or "are accepted" in str(one) for one in chain)  # /dev/shm; an input
        if isinstance(error, WriteError) or not told or elsewhere:
            raise
        place = next((one.filename for one in chain if isinstance(one, OSError) and one.filename), place)
        there = next(one for one in (Path(place) / "_").absolute().parents if one.exists())
        needed = "" if size is None else f"it takes {size / 1e6:,.1f} MB, and "
        free = f"{shutil.disk_usage(there).free / 1e6:,.1f} MB are free there"
        reason = os.strerror(int(next((match[1] for match in told if match[1]), errno.ENOSPC)))
        raise WriteError(f"{place} cannot be written ({reason}): {needed}{free}. {remedy}".strip()) from error


def write_whole(file: Path, data: bytes) -> None:
    """Write a whole file or none of it, also if the power fails."""
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    with open(temporary, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder of this process that takes its final name in one step when its writing has succeeded.

    Args:
        folder: which must not exist, or be empty.
        replace: it may: what this program wrote there before is removed then, and what it did not write stays.
    """
    folder = folder.resolve() if replace else folder  # it may be a link to another disk
    before = folder.with_name(f".{folder.name}.replaced")
    if before.is_dir() and replace:  # killed while it was replaced
        _take_over(before, folder) if folder.exists() else os.replace(before, folder)
    host = platform.node()
    name = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)@{re.escape(host)}\.partial")
    for left in folder.parent.glob(".*.partial"):
        match = name.fullmatch(left.name)
        if match and not psutil.pid_exists(int(match[1])):  # it was killed, on this machine
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}@{host}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace:
            (temporary / MARK).write_text(json.dumps(sorted({MARK, *os.listdir(temporary)})))
            if folder.exists():
                os.replace(folder, before)
        os.replace(temporary, folder)
        if before.is_dir() and replace:
            _take_over(before, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_over(before: Path, folder: Path) -> None:
    """Move what this program did not write from a folder to the one that has replaced it, and remove the rest."""
    own = {*written_here(before), *os.listdir(folder)}
    for entry in before.iterdir():
        if entry.name not in own:
            os.replace(entry, folder / entry.name)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    before.rmdir()


def written_here(folder: Path) -> list[str]:
    """The names of what this program wrote into a folder that it may replace; none for a folder that it did not."""
    with suppress(OSError, ValueError):
        return list(json.loads((folder / MARK).read_bytes()))
    return []


@dataclass(frozen=True)
class Place:
    """Where the output goes, and where the state is kept until it is complete.

    Args:
        out: a local folder, or ``None``.
        remote: the address of a remote, or ``None``.
        state: a local folder.
        attempts: how often an upload is tried.
    """

    out: Path | None
    remote: str | None
    state: Path
    attempts: int = 1

    @property
    def label(self) -> str:
        return self.remote or str(self.out)

    def publish(self, folder: Path, names: Sequence[str]) -> None:
        """Move finished files from a local folder to where the output goes."""
        if self.out is not None:
            for name in names:
                os.replace(folder / name, self.out / name)
            return
        for name in names:
            for attempt in range(1, self.attempts + 1):
                try:
                    self.uploader(folder).upload_file(name)
                    break
                except Exception as error:
                    if attempt == self.attempts or isinstance(error, StorageError) or is_final(error):
                        raise StorageError(
                            f"{self.remote}/{name}: the upload failed {attempt} times "
                            f"({told(error, self.remote or '', 200)}); run the same command again to go on."
                        ) from error
                sleep(2.0 ** (attempt - 1))
            (folder / name).unlink(missing_ok=True)

    def uploader(self, folder: Path) -> Any:
        """Streaming's uploader from a local folder."""
        key = (self.remote, str(folder), os.getpid())
        if key not in _UPLOADERS:
            with telling(self.remote or ""), tempfile.TemporaryDirectory(dir=self.state) as empty:
                uploader = uploader_of(self.remote or "", empty)
            uploader.local = str(folder)
            _UPLOADERS[key] = uploader
        return _UPLOADERS[key]

    def names(self) -> set[str] | None:
        """The names of the files in the output, or ``None`` where a remote cannot list them."""
        if self.out is not None:
            return {entry.name for entry in os.scandir(self.out)}
        try:
            with telling(self.label, ": cannot be listed"):
                listed = self.uploader(self.state).list_objects()
        except (NotImplementedError, FileNotFoundError):
            return None
        return None if listed is None else {name.rpartition("/")[2] for name in listed} - {PROBE}

    def read(self, name: str, names: set[str] | None) -> bytes | None:
        """One small file of the output, or ``None`` if it is not there.

        Args:
            name: of the file.
            names: of all files, see :meth:`names`; not to get one of them from a remote is an error.
        """
        if names is not None and name not in names:
            return None
        if self.out is not None:
            path = self.out / name
            return path.read_bytes() if path.exists() else None
        from composer_prior.data.download import download_from

        with tempfile.TemporaryDirectory(dir=self.state) as folder:
            local = Path(folder) / name
            try:
                download_from(f"{self.remote}/{name}", local, attempts=1 if names is None else self.attempts)
                return local.read_bytes()
            except DataError as error:
                if names is not None or is_denied(error):
                    raise StorageError(f"{self.remote}/{name} cannot be read: {error}.") from error
                return None  # remotes say in many ways that a file is missing


_UPLOADERS: dict[tuple[str | None, str, int], Any] = {}
