"""Image files that really lie within the folders they may be read from."""

import os
import re
import stat
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_HUB_REPOSITORY = re.compile(r"(datasets|models|spaces)--.+")


class RejectedImage(ValueError):
    """An image that is not to be read; ``reason`` and ``detail`` as in :class:`Rejected`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def read_image(root: Path, name: str, limit: int, *also: Path) -> bytes:
    """The bytes of an image file that really lies within a folder.

    Args:
        root: the folder, resolved.
        name: the image's path, see :func:`inside`.
        limit: the largest file to read, in bytes.
        also: more such folders.

    Returns:
        The file's bytes.

    Raises:
        RejectedImage: the path leads out of the folders; the file is missing, unreadable, not a regular file or too
            large.
    """
    path = inside(root, name, *also)
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RejectedImage("not a regular file")
            if status.st_size > limit:
                raise RejectedImage("image too large", f"{status.st_size} bytes, at most {limit} are accepted")
            return file.read() or b""
    except (FileNotFoundError, NotADirectoryError):
        raise RejectedImage("missing file", "not in the folder of images, which images= names") from None
    except IsADirectoryError:
        raise RejectedImage("not a regular file") from None
    except OSError as error:
        raise RejectedImage("unreadable file", error.strerror or str(error)) from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe would otherwise wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def inside(root: Path, name: str, *also: Path) -> str:
    """Where an image that a list names really lies, which must be below ``root`` or one of the other folders.

    ``name`` is relative to ``root``, or absolute (also ``file://``) and then says where the image is in its own right;
    backslashes are taken for slashes where no file has them in its name. A symbolic link must not lead out of the
    folders, except into the blobs of the Hugging Face cache's repository that ``root`` is a snapshot of.

    Raises:
        RejectedImage: saying what to do about it.
    """
    name = _plain_path(root, name)
    folder, base = os.path.split(os.path.join(root, name))
    path = os.path.join(_real_folder(folder), base)
    if os.path.islink(path):
        link, path = path, os.path.realpath(path)
        blobs = _hub_blobs(str(root))
        if blobs and path.startswith(blobs) and link.startswith(os.path.join(root, "")):
            return path
    if any(path.startswith(os.path.join(place, "")) for place in (root, *also)):
        return path
    how = "it is absolute, and not below the source" if name.startswith("/") else "through a symbolic link"
    raise RejectedImage("path leaves the source", f"{how}; name the folder that holds the images with images=")


def _plain_path(root: Path, name: str) -> str:
    """A path as this system writes it, without ``..``."""
    if name[:7].lower() == "file://":
        name = "/" + unquote(name[7:].partition("/")[2])
    elif "://" in name or name.startswith("data:"):
        raise RejectedImage("image is a URL", "download the images first, with img2dataset for example")
    if not name or "\0" in name or not _can_be_a_path(name):
        raise RejectedImage("bad path", "empty, or with characters that no path can have")
    if _DRIVE.match(name):
        raise RejectedImage("path leaves the source", "a drive of Windows; write paths relative to images=")
    if "\\" in name and not os.path.lexists(os.path.join(root, name)):
        name = name.replace("\\", "/")
    if ".." in name.split("/"):
        name = os.path.normpath(name)
        if name.split("/")[0] == "..":
            raise RejectedImage("path leaves the source", "by '..'; write paths relative to images=")
    return "/" + name.lstrip("/") if name.startswith("//") else name


def _can_be_a_path(name: str) -> bool:
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


@lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


@lru_cache(maxsize=64)
def _hub_blobs(root: str) -> str | None:
    """Where the links in a snapshot of the Hugging Face cache lead: ``REPOSITORY/snapshots/REVISION`` to its blobs."""
    for folder in (Path(root), *Path(root).parents):
        if folder.parent.name == "snapshots" and _HUB_REPOSITORY.fullmatch(folder.parent.parent.name):
            return os.path.join(folder.parent.parent, "blobs", "")
    return None
