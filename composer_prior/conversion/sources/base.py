"""Records, options and columns that all sources share."""

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from composer_prior.data.images import MAX_IMAGE_BYTES

FORMATS = ("jsonl", "csv", "tsv", "json", "coco", "webdataset", "folder", "parquet", "hf")
SPANS = "image_related_spans"

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "svg", "avif", "jxl", "heic")
IMAGE_COLUMNS = (
    *("image", "image_path", "image_file", "file_name", "filename", "filepath", "path", "img", "jpg", "png"),
    "images",
)
CAPTION_COLUMNS = (
    *("conversations", "messages"),
    *("caption", "captions", "text", "txt", "sentence", "sentences", "description"),
)
_URL_COLUMNS = ("url", "image_url", "img_url", "urls")
KEY_COLUMNS = ("id", "key", "__key__")
_SEEN_CACHE_KIB = 64 << 10


class SourceError(ValueError):
    """A source that cannot be read at all: an unknown or ambiguous format, a missing column, a missing package."""


@dataclass(frozen=True)
class Record:
    """One image with its captions, not yet checked.

    Args:
        key: name of the record in its source.
        image: the encoded bytes, or a path relative to the source's folder of images.
        captions: the captions as found, of any type.
        where: file and position, for messages.
        spans: for each caption its ``image_related_spans``, where the source has them.
        explicit: whether ``key`` is an id of the source, which must be unique.
        note: advice for the message if it has no caption.
    """

    key: str
    image: bytes | str
    captions: tuple[Any, ...]
    where: str
    spans: tuple[Any, ...] | None = None
    explicit: bool = False
    note: str = ""


@dataclass(frozen=True)
class Rejected:
    """A record, or one caption of it, that is not converted.

    Args:
        key: its name in the source.
        reason: a short fixed phrase, to count by.
        where: file and position.
        detail: the exact problem.
        count: number of captions that it stands for; 0 if it is not a sample, ``None`` if unknown.
        estimated: whether ``count`` is an estimate.
    """

    key: str
    reason: str
    where: str
    detail: str = ""
    count: int | None = 1
    estimated: bool = False


@dataclass(frozen=True)
class BadFile(Rejected):
    """A file that cannot be read to its end; ``where`` is its name, ``count`` the number of lost captions if known."""

    count: int | None = None

    @classmethod
    def of(cls, name: str, detail: str, count: int | None = None) -> "BadFile":
        """Return a file that cannot be read at all."""
        return cls(name, "unreadable file", name, detail, count)


@dataclass(frozen=True)
class SourceOptions:
    """Options of reading a source; the defaults suit the usual names.

    Args:
        form: format of the source: jsonl, csv, tsv, json, coco, webdataset, folder, parquet or hf; recognised by
            default.
        images: the folder that image paths are relative to; found beside the captions by default.
        image_column: column, field or tar suffix that holds the image, as bytes or as a path.
        caption_column: column, field or tar suffix that holds one caption, a list of them, or a conversation.
        key_column: column or field that names a record; ``id`` and ``key`` are recognised.
        split: the split to read of a Hugging Face dataset.
        unit_samples: records in one unit of work, unless the format determines it.
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
    max_image_bytes: int = MAX_IMAGE_BYTES
    download_timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("form", "images", "image_column", "caption_column", "key_column", "split"):
            self._as_text(name)
        if self.form is not None and self.form not in FORMATS:
            raise SourceError(f"form={self.form!r} is unknown: use one of {', '.join(FORMATS)}.")
        for name in ("unit_samples", "max_image_bytes"):
            expect_number(name, getattr(self, name), 1)
        expect_number("download_timeout", self.download_timeout, 1, whole=False)

    def _as_text(self, name: str) -> None:
        """Convert an option to text, also if a number or a path was given, as in ``images=2017``."""
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (str, int, os.PathLike)) or not str(value):
            raise SourceError(f"{name}={value!r} is not accepted: expected a name, or leave it out.")
        object.__setattr__(self, name, os.fspath(value) if isinstance(value, os.PathLike) else str(value))


def expect_number(name: str, value: Any, least: float, whole: bool = True) -> None:
    """Refuse an option that is not a number of at least ``least``."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
        raise SourceError(f"{name}={value!r} is not accepted: expected a {'whole ' * whole}number of at least {least}.")


class Source(Protocol):
    """A recognised source. It is picklable, so that any process can read any unit."""

    @property
    def format(self) -> str:
        """Return one of :data:`FORMATS`."""

    @property
    def images(self) -> Path:
        """Return the folder that image paths are relative to, resolved."""

    @property
    def folder(self) -> Path:
        """Return the folder of the source, resolved; absolute paths of images below it are read, too."""

    @property
    def total(self) -> int | None:
        """Return the number of records, or None if it is not known in advance."""

    @property
    def has_spans(self) -> bool:
        """Return whether the first records have ``image_related_spans``."""

    def bad_files(self) -> Iterator[BadFile]:
        """Yield files that are known to be unreadable without reading them through."""

    def units(self) -> Iterator[Any]:
        """Yield units of work in a fixed order; each is small, picklable and identified by its ``repr``."""

    def read(self, unit: Any) -> Iterator[Record | Rejected]:
        """Yield the records of one unit, in a fixed order."""


def pick(names: Sequence[str], wanted: str | None, usual: Sequence[str], option: str, where: str) -> str:
    """Return the wanted column, or else the first of the usual ones that exists."""
    chosen = wanted or next((name for name in usual if name in names), None)
    if chosen is None or chosen not in names:
        listed = " ".join(", ".join(map(str, names)).split())[:300] or "none"
        problem = f"no column {wanted!r}" if wanted else f"no column named {' or '.join(usual[:3])}"
        urls = option == "image_column" and not wanted and any(name.lower() in _URL_COLUMNS for name in names)
        hint = "; where it lists URLs, download the images first, with img2dataset for example" if urls else ""
        raise SourceError(f"{where}: {problem}{hint}; choose one of its columns ({listed}) with {option}=.")
    return chosen


def pick_columns(names: Sequence[str], options: SourceOptions, where: str, folder: Path) -> tuple[str, str, Path]:
    """Return the columns of images and captions, and the folder of images that are paths.

    Raises:
        SourceError: if a column or the folder is missing.
    """
    image = pick(names, options.image_column, IMAGE_COLUMNS, "image_column", where)
    caption = pick(names, options.caption_column, CAPTION_COLUMNS, "caption_column", where)
    if options.key_column:
        pick(names, options.key_column, (), "key_column", where)
    return image, caption, asked_folder(options.images) if options.images else folder.resolve()


def load(module: str) -> Any:
    """Import an optional package, or raise one line with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise SourceError(
            f"Reading this source needs the package {package}: pip install 'composer-prior[convert]'."
        ) from error


class Seen:
    """A set of identities, stored as 8-byte hashes in a temporary sqlite file, in bounded memory."""

    def __init__(self) -> None:
        self._digests = sqlite3.connect("", isolation_level=None)
        settings = ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_SEEN_CACHE_KIB}")
        for setting in settings:
            self._digests.execute(f"PRAGMA {setting}")
        self._digests.execute("CREATE TABLE seen (digest INTEGER PRIMARY KEY)")
        self._digests.execute("BEGIN")

    def add(self, *identity: Any) -> bool:
        """Add an identity, and return whether it is new."""
        digest = hashlib.blake2b(repr(identity).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "little", signed=True)
        return self._digests.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number,)).rowcount == 1


@dataclass(frozen=True)
class FileUnit:
    """A file, or a range of its row groups; a changed file is another unit."""

    name: str
    size: int
    modified: int
    first: int = 0
    last: int = 0
    row: int = 0
    repeated: tuple[int, ...] = ()


def file_of(unit: Any) -> str | None:
    """Return the file that a unit of work belongs to, or None if it spans several."""
    if isinstance(unit, (FileUnit, BadFile)):
        return unit.name if isinstance(unit, FileUnit) else unit.where
    return unit if isinstance(unit, str) else None


def asked_folder(images: str) -> Path:
    """Return the folder that ``images=`` names, resolved."""
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise SourceError(f"images={images}: no such folder.")
    return folder.resolve()
