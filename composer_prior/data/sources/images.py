"""Image files that really lie within the folder they are to be read from."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path


class RejectedImage(ValueError):
    """An image that is not to be read; ``reason`` and ``detail`` as in :class:`Rejected`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def read_image(root: Path, name: str, limit: int) -> bytes:
    """The bytes of an image file that really lies within a folder.

    Args:
        root: the folder, resolved.
        name: the image's path relative to it.
        limit: the largest file to read, in bytes.

    Returns:
        The file's bytes.

    Raises:
        RejectedImage: the path is absolute, has ``..``, or leads out of the folder through a symbolic link; the file is
            missing, unreadable, not a regular file or too large.
    """
    path = inside(root, name)
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RejectedImage("not a regular file")
            if status.st_size > limit:
                raise RejectedImage("image too large", f"{status.st_size} bytes, at most {limit} are accepted")
            return file.read() or b""
    except (FileNotFoundError, NotADirectoryError):
        raise RejectedImage("missing file") from None
    except IsADirectoryError:
        raise RejectedImage("not a regular file") from None
    except OSError as error:
        raise RejectedImage("unreadable file", error.strerror or str(error)) from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file; a named pipe would otherwise wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def inside(root: Path, name: str) -> str:
    """The path of ``name`` within ``root``, or :class:`RejectedImage` if it leads out of it."""
    if not name or "\0" in name:
        raise RejectedImage("bad path")
    if name.startswith("/") or ".." in name.split("/"):
        raise RejectedImage("path leaves the source", "absolute paths and '..' are refused")
    folder, base = os.path.split(os.path.join(root, name))
    path = os.path.join(_real_folder(folder), base)
    if os.path.islink(path):
        path = os.path.realpath(path)
    if not path.startswith(os.path.join(root, "")):
        raise RejectedImage("path leaves the source", "through a symbolic link")
    return path


@lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)
