"""Image files, read only from permitted folders."""

import os
import re
import unicodedata
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from composer_prior.data.images import ImageError, read_image_file

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_HUB_REPOSITORY = re.compile(r"(datasets|models|spaces)--.+")
_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def read_image(root: Path, name: str, limit: int, *also: Path) -> bytes:
    """Read an image file of at most ``limit`` bytes, or raise ImageError; see :func:`.find_inside`."""
    try:
        return read_image_file(find_inside(root, name, *also), limit)
    except ImageError as error:
        where = "not in the folder of images, which images= names"
        raise (ImageError("missing file", where) if error.reason == "missing file" else error) from None


def find_inside(root: Path, name: str, *also: Path) -> str:
    """Return the real path of an image, see :func:`inside`; its Unicode normalisation may differ, as on macOS."""
    path = inside(root, name, *also)
    if path.isascii() or os.path.exists(path):
        return path
    found = "/"
    for part in Path(os.path.join(root, _plain_path(root, name))).parts[1:]:
        same = [part]
        if not os.path.lexists(os.path.join(found, part)):
            same = _normalised_names(found).get(normal_form(part), [])
        if len(same) > 1:
            raise ImageError("ambiguous name", f"{len(same)} files have it in other Unicode forms; keep one of them")
        if not same:
            return path
        found = os.path.join(found, same[0])
    return inside(root, found.removeprefix(os.path.join(root, "")), *also)


@lru_cache(maxsize=64)
def _normalised_names(folder: str) -> dict[str, list[str]]:
    """Return the names in a folder that are not ASCII, by their normal form."""
    found: dict[str, list[str]] = {}
    with suppress(OSError):
        for name in os.listdir(folder):
            if not name.isascii():
                found.setdefault(normal_form(name), []).append(name)
    return found


def normal_form(name: str) -> str:
    """Return a name in Unicode's normal form C, to compare it."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def inside(root: Path, name: str, *also: Path) -> str:
    """Return the real path of an image, or raise ImageError if it is not below ``root`` or one of the other folders.

    ``name`` is relative to ``root``, or absolute (also ``file://``); backslashes are read as slashes unless a file has
    them in its name. A symbolic link must not lead out of the folders, except into the blobs of the Hugging Face
    cache's repository that ``root`` is a snapshot of.
    """
    name = _plain_path(root, name)
    folder, base = os.path.split(os.path.join(root, name))
    path = os.path.join(_real_folder(folder), base)
    real = os.path.realpath(path) if os.path.islink(path) else path
    blobs = _hub_blobs(str(root)) if real != path else None
    if blobs and real.startswith(blobs) and path.startswith(os.path.join(root, "")):
        return path
    if any(real.startswith(os.path.join(permitted, "")) for permitted in (root, *also)):
        return path
    how = "it is absolute, and not below the source" if name.startswith("/") else "through a symbolic link"
    raise ImageError("path leaves the source", f"{how}; name the folder that holds the images with images=")


def _plain_path(root: Path, name: str) -> str:
    """Return a path with this system's separators and without ``..``."""
    if name[:7].lower() == "file://":
        name = "/" + unquote(name[7:].partition("/")[2])
    elif "://" in name:
        raise ImageError("image is a URL", "download the images first, with img2dataset for example")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        name = ""
    if not name or "\0" in name:
        raise ImageError("bad path", "empty, or with characters that no path can have")
    if _DRIVE.match(name):
        raise ImageError("path leaves the source", "a drive of Windows; write paths relative to images=")
    if "\\" in name and not os.path.lexists(os.path.join(root, name)):
        name = name.replace("\\", "/")
    if ".." in name.split("/"):
        name = os.path.normpath(name)
        if name.split("/")[0] == "..":
            raise ImageError("path leaves the source", "by '..'; write paths relative to images=")
    return "/" + name.lstrip("/") if name.startswith("//") else name


@lru_cache(maxsize=64)
def _hub_blobs(root: str) -> str | None:
    """Return the folder of blobs that the links in a snapshot of the Hugging Face cache lead to."""
    for folder in (Path(root), *Path(root).parents):
        if folder.parent.name == "snapshots" and _HUB_REPOSITORY.fullmatch(folder.parent.parent.name):
            return os.path.join(folder.parent.parent, "blobs", "")
    return None
