"""Files of the wrong kind, recognised by their first and last bytes."""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer_prior.conversion.sources.base import BadFile, FileUnit
from composer_prior.data.files import open_plain

_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with git lfs pull"),
    (b"/annex/objects", "a git-annex pointer; fetch the file itself with git annex get"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd data; unpack it with zstd -d"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"%PDF", "a PDF file"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"\x1f\x8b", "gzip data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"<?xml", "XML, not the file itself; download it again"),
    (b"<!doctype html", "an HTML page, not the file itself; download it again"),
    (b"<html", "an HTML page, not the file itself; download it again"),
)
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_NAMED = 3


def kind_of(head: bytes) -> str | None:
    """Return the kind of a file by its first bytes, or None for text and unknown formats."""
    lowered = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = (kind for magic, kind in _KINDS if head.startswith(magic) or lowered.startswith(magic))
    return next(known, "a tar archive" if head[257:262] == b"ustar" else None)


def beginning(path: Path) -> tuple[bytes, int]:
    """Return the first 512 bytes of a file, and its size; OSError is raised unless it is a regular file."""
    with open_plain(path) as file:
        return file.read(512), os.fstat(file.fileno()).st_size


def parquet_problem(path: Path) -> str | None:
    """Return the reason why a file cannot be Parquet, or None if it may be."""
    head, size = beginning(path)
    if head.startswith(b"PAR1"):
        with open(path, "rb") as file:
            file.seek(max(0, size - 8))
            tail = file.read(8)
        whole = tail[4:] == b"PAR1" and int.from_bytes(tail[:4], "little") <= size - 12
        return None if whole else f"cut after {size} bytes: it has no end of Parquet"
    return (kind_of(head) or "not a Parquet file") if size else "empty"


def tar_problem(path: Path) -> str | None:
    """Return the reason why a file cannot be a tar archive, compressed or not, or None if it may be."""
    head, size = beginning(path)
    if not size:
        return "empty"
    kind = kind_of(head)
    if opener := next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None):
        try:
            with opener(path) as file:
                inner = file.read(512)
        except EOFError:
            return f"cut after {size} bytes of {kind}"
        except (OSError, zlib.error, lzma.LZMAError) as error:
            return f"damaged {kind} ({error})"
        within = kind_of(inner)
        return None if len(inner) == 512 and within in (None, "a tar archive") else f"{kind} without a tar archive"
    if kind != "a tar archive" and kind:
        return kind
    return f"cut after {size} bytes" if size < 512 else None


def describe(bad: Sequence[BadFile]) -> str:
    """Describe the first few bad files."""
    named = ", ".join(f"{item.where} ({item.detail})" for item in bad[:_NAMED])
    return f"{named} and {len(bad) - _NAMED} more" if len(bad) > _NAMED else named


def file_unit(
    root: Path, file: Path, problem_of: Callable[[Path], str | None], reason: str = "unreadable file"
) -> FileUnit | BadFile:
    """Return the unit of a file of a source, or a bad file if ``problem_of`` returns a problem; links are followed."""
    name = file.relative_to(root).as_posix()
    try:
        problem = problem_of(file)
        status = os.stat(file)
    except OSError as error:
        lost = file.is_symlink() and not file.exists()
        return BadFile.of(name, "a link to what is not there" if lost else error.strerror or str(error))
    if problem:
        return BadFile(name, reason, name, problem)
    return FileUnit(name, status.st_size, status.st_mtime_ns)
