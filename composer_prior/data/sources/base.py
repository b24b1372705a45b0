"""What all sources have in common: their records, their options, and how columns are found."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from composer_prior.data.sources.images import RejectedImage, inside

FORMS = ("jsonl", "csv", "tsv", "json", "coco", "webdataset", "parquet", "hf")
SPANS = "image_related_spans"

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "svg", "avif", "jxl", "heic")
IMAGE_COLUMNS = ("image", "image_path", "image_file", "file_name", "filename", "filepath", "path", "img", "jpg", "png")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences", "description")
KEY_COLUMNS = ("id", "key", "__key__")
_SEEN_CACHE_KIB = 64 << 10


class SourceError(ValueError):
    """A source that cannot be read at all: an unknown or ambiguous form, a missing column, a missing package."""


@dataclass(frozen=True)
class Record:
    """One image with its captions, not yet checked.

    Args:
        key: what names the record in its source.
        image: the encoded bytes, or a path relative to the source's folder of images.
        captions: the captions as found, of whatever type.
        where: file and place, for messages.
        spans: for each caption its ``image_related_spans``, where the source has them.
        explicit: whether ``key`` is the source's own id, which may not come twice.
    """

    key: str
    image: bytes | str
    captions: tuple[Any, ...]
    where: str
    spans: tuple[Any, ...] | None = None
    explicit: bool = False


@dataclass(frozen=True)
class Rejected:
    """A record, or one caption of it, that is not converted.

    Args:
        key: what names it in its source.
        reason: a short fixed phrase, to count by.
        where: file and place.
        detail: what exactly is wrong.
    """

    key: str
    reason: str
    where: str
    detail: str = ""


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source; the defaults suit the usual names.

    Args:
        form: one of :data:`FORMS`; recognised from the source by default.
        images: the folder that image paths are relative to; found beside the captions by default.
        image_column: column, field or tar suffix that holds the image, as bytes or as a path.
        caption_column: column, field or tar suffix that holds one caption or a list of them.
        key_column: column or field that names a record; ``id`` and ``key`` are recognised.
        split: which split of a Hugging Face dataset.
        unit_samples: records in one unit of work, where the form does not dictate it.
        max_image_bytes: larger images are rejected without being read.
        download_timeout: the longest time in seconds of one attempt to download a file of a remote source.
    """

    form: str | None = None
    images: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    split: str | None = None
    unit_samples: int = 2048
    max_image_bytes: int = 64 << 20
    download_timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in FORMS:
            raise SourceError(f"form={self.form!r} is unknown: use one of {', '.join(FORMS)}.")
        for name in ("unit_samples", "max_image_bytes", "download_timeout"):
            if getattr(self, name) < 1:
                raise SourceError(f"{name}={getattr(self, name)} must be at least 1.")


class Source(Protocol):
    """A recognised source. It is picklable, so that any process can read any unit."""

    @property
    def form(self) -> str:
        """One of :data:`FORMS`."""

    @property
    def images(self) -> Path:
        """The folder that image paths are relative to, resolved."""

    @property
    def total(self) -> int | None:
        """How many records there are, where that is known beforehand."""

    @property
    def has_spans(self) -> bool:
        """Whether its first records have ``image_related_spans``."""

    def units(self) -> Iterator[Any]:
        """Units of work in a fixed order; each is small, picklable, and its ``repr`` says all that it is."""

    def read(self, unit: Any) -> Iterator[Record | Rejected]:
        """The records of one unit, in a fixed order."""


def is_remote(path: str | Path) -> bool:
    """Whether a path names a remote of streaming rather than a file or folder of this machine."""
    return "://" in str(path) or str(path).startswith("dbfs:")


def pick(names: Sequence[str], wanted: str | None, usual: Sequence[str], option: str, where: str) -> str:
    """The column to use: the one asked for, or the first of the usual names that is there."""
    chosen = wanted or next((name for name in usual if name in names), None)
    if chosen is None or chosen not in names:
        listed = ", ".join(map(str, names)) or "none"
        problem = f"no column {wanted!r}" if wanted else f"no column named {' or '.join(usual[:3])}"
        raise SourceError(f"{where}: {problem}; choose one of its columns ({listed}) with {option}=.")
    return chosen


def load(module: str) -> Any:
    """An optional package, or one line that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise SourceError(
            f"Reading this source needs the package {package}: pip install 'composer-prior[convert]'."
        ) from error


def value_of(entry: dict[str, Any], wanted: str | None, usual: Sequence[str]) -> Any:
    return entry.get(wanted) if wanted else next((entry[name] for name in usual if name in entry), None)


def several(caption: Any, spans: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """One caption or a list of them, with as many lists of spans."""
    if not isinstance(caption, (list, tuple)):
        return (() if caption is None else (caption,)), (spans,)
    return tuple(caption), tuple(spans) if isinstance(spans, list) and len(spans) == len(caption) else (spans,) * len(
        caption
    )


class Seen:
    """What was seen before, by eight bytes of hash, in a temporary file of sqlite: memory stays within its cache."""

    def __init__(self) -> None:
        self._digests = sqlite3.connect("", isolation_level=None)
        settings = ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_SEEN_CACHE_KIB}")
        for setting in settings:
            self._digests.execute(f"PRAGMA {setting}")
        self._digests.execute("CREATE TABLE seen (digest INTEGER PRIMARY KEY)")
        self._digests.execute("BEGIN")

    def add(self, *identity: Any) -> bool:
        """Whether it is new."""
        digest = hashlib.blake2b(repr(identity).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "little", signed=True)
        return self._digests.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number,)).rowcount == 1


@dataclass(frozen=True)
class FileUnit:
    """A file, or a part of it; a file that has changed is another unit."""

    name: str
    size: int
    modified: int
    first: int = 0
    last: int = 0
    row: int = 0
    repeated: tuple[int, ...] = ()


def file_unit(root: Path, file: Path) -> FileUnit | Rejected:
    name = file.relative_to(root).as_posix()
    try:
        status = os.stat(inside(root.resolve(), name))
    except RejectedImage as error:
        return Rejected(name, error.reason, name, error.detail)
    except OSError as error:
        return Rejected(name, "unreadable file", name, error.strerror or str(error))
    return FileUnit(name, status.st_size, status.st_mtime_ns)


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
