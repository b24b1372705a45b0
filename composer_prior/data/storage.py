"""Files and folders that are written whole or not at all, and one-line errors if that fails."""

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from composer_prior.data.messages import OneLineError

MARK = ".composer-prior.json"  # lists the files that this program wrote into the folder
_FULL = re.compile(
    rf"(?:os error|\[Errno) ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b"
    r"|No space left on device|unexpected pos \d+|PytorchStreamWriter failed"
)


class StorageError(OneLineError, RuntimeError):
    """A folder or remote that cannot be written to or read."""


class WriteError(OneLineError, OSError):
    """A path that cannot be written to, or whose disk is full."""


def is_remote(path: str | Path) -> bool:
    """Return whether a path is the URL of a remote rather than a file or folder of this machine."""
    return "://" in str(path) or str(path).startswith("dbfs:")


@contextmanager
def full_disk_told(path: str | Path, size: int | None = None, remedy: str = "") -> Iterator[None]:
    """Raise a full disk as one line with the path, the bytes to be written there and the free bytes."""
    try:
        yield
    except BaseException as error:  # torch's error for sharded checkpoints is not an Exception
        chain = [error]
        while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
            chain.append(below)
        told = [match for one in chain if (match := _FULL.search(f"[Errno {getattr(one, 'errno', None)}] {one}"))]
        elsewhere = any("</torch_" in str(one) or "are accepted" in str(one) for one in chain)  # /dev/shm; an input
        if isinstance(error, WriteError) or not told or elsewhere:
            raise
        path = next((one.filename for one in chain if isinstance(one, OSError) and one.filename), path)
        there = next(one for one in (Path(path) / "_").absolute().parents if one.exists())
        needed = "" if size is None else f"it takes {size / 1e6:,.1f} MB, and "
        free = f"{shutil.disk_usage(there).free / 1e6:,.1f} MB are free there"
        reason = os.strerror(int(next((match[1] for match in told if match[1]), errno.ENOSPC)))
        raise WriteError(f"{path} cannot be written ({reason}): {needed}{free}. {remedy}".strip()) from error


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
    """Yield a temporary folder of this process that takes its final name in one step when its writing has succeeded.

    ``replace`` accepts a folder that is not empty; files that this program wrote there are removed, other files stay.
    """
    folder = folder.resolve() if replace else folder  # it may be a link to another disk
    before = folder.with_name(f".{folder.name}.replaced")
    if before.is_dir() and replace:  # killed while it was replaced
        _take_over(before, folder) if folder.exists() else os.replace(before, folder)
    host = platform.node()
    name = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)@{re.escape(host)}\.partial")
    for left in folder.parent.glob(".*.partial"):
        match = name.fullmatch(left.name)
        if match and not psutil.pid_exists(int(match[1])):  # its process was killed
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
    """Move files that this program did not write from the old folder to the new one, and remove the rest."""
    obsolete = {*written_here(before), *os.listdir(folder)}
    for entry in before.iterdir():
        if entry.name not in obsolete:
            os.replace(entry, folder / entry.name)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    before.rmdir()


def written_here(folder: Path) -> list[str]:
    """Return the names of the files that this program wrote into a folder."""
    with suppress(OSError, ValueError):
        return list(json.loads((folder / MARK).read_bytes()))
    return []
