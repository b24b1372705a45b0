"""Records, options and columns that all sources share."""

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from composer_prior.data.images import MAX_IMAGE_BYTES

FORMATS = ("jsonl", "csv", "tsv", "json", "coco", "txt", "webdataset", "folder", "parquet", "hf")
SPANS = "image_related_spans"

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "svg", "avif", "jxl", "heic")
IMAGE_COLUMNS = (
    "image", "image_path", "image_file", "file_name", "filename", "filepath", "path", "img", "jpg", "png", "images"
)  # fmt: skip
CAPTION_COLUMNS = (
    "conversations", "messages", "caption", "captions", "text", "txt", "sentence", "sentences", "description"
)  # fmt: skip
CHAT_COLUMNS = ("messages", "conversations", "texts", *CAPTION_COLUMNS)
CHAT_IMAGE_COLUMNS = ("images", *IMAGE_COLUMNS)
ANSWER_COLUMNS = ("multiple_choice_answer", "answer", "answers")  # beside one of questions
_URL_COLUMNS = ("url", "image_url", "img_url", "urls")
KEY_COLUMNS = ("id", "key", "__key__")
_SEEN_CACHE_KIB = 64 << 10


class SourceError(ValueError):
    """A source that cannot be read at all: an unknown or ambiguous format, a missing column, a missing package."""


@dataclass(frozen=True)
class Record:
    """One image with its captions, not yet checked."""

    key: str
    image: bytes | str  # encoded, or a path relative to the source's folder of images
    captions: tuple[Any, ...]  # as found, of any type
    where: str  # file and position, for messages
    spans: tuple[Any, ...] | None = None  # for each caption its ``image_related_spans``, where the source has them
    explicit: bool = False  # whether ``key`` is an id of the source, which must be unique
    messages: Any = None  # of a conversation or document, which has no captions, see composer_prior.data.conversations
    images: tuple[bytes | str, ...] = ()  # of a conversation or document
    further: int = 0  # conversations with more answers than the one that is the caption
    note: str = ""  # advice for the message if it has no caption


@dataclass(frozen=True)
class Rejected:
    """A record, or one caption of it, that is not converted."""

    key: str
    reason: str  # a short fixed phrase, to count by
    where: str
    detail: str = ""  # the exact problem
    count: int | None = 1  # number of captions that it stands for; 0 if it is not a sample, None if unknown
    estimated: bool = False  # whether ``count`` is an estimate


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
        form: format of the source: jsonl, csv, tsv, json, coco, txt, webdataset, folder, parquet or hf; recognised by
            default.
        images: the folder that image paths are relative to; found beside the captions by default.
        image_column: column, field or tar suffix that holds the image, as bytes or as a path; with ``learn`` also
            ``none``, for text that has other things in a column such as ``path``.
        caption_column: column, field or tar suffix that holds one caption, a list of them, or a conversation.
        key_column: column or field that names a record; ``id`` and ``key`` are recognised.
        split: the split to read of a Hugging Face dataset.
        learn: read conversations, interleaved documents and text with any number of images, and say what is learned:
            ``"answers"``, ``"last"`` (the last answer alone) or ``"all"`` (all text, without roles). A caption is the
            answer to its image; of other text without turns all is learned. By default the first answer about an image
            is its caption.
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
    learn: str | None = None
    unit_samples: int = 2048
    max_image_bytes: int = MAX_IMAGE_BYTES
    download_timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("form", "images", "image_column", "caption_column", "key_column", "split"):
            self._as_text(name)
        if self.form is not None and self.form not in FORMATS:
            raise SourceError(f"form={self.form!r} is unknown: use one of {', '.join(FORMATS)}.")
        expect("learn", self.learn, self.learn in (None, "answers", "last", "all"), "answers, last or all")
        for name in ("unit_samples", "max_image_bytes"):
            expect_number(name, getattr(self, name), 1)
        expect_number("download_timeout", self.download_timeout, 1, whole=False)

    def images_folder(self) -> Path | None:
        """Return the folder that ``images=`` names, resolved."""
        if self.images is None:
            return None
        folder = Path(self.images).expanduser()
        if not folder.is_dir():
            raise SourceError(f"images={self.images}: no such folder.")
        return folder.resolve()

    def _as_text(self, name: str) -> None:
        """Convert an option to text, also if a number or a path was given, as in ``images=2017``."""
        value = getattr(self, name)
        if value is None:
            return
        is_name = isinstance(value, (str, int, os.PathLike)) and not isinstance(value, bool) and bool(str(value))
        expect(name, value, is_name, "a name, or leave it out")
        object.__setattr__(self, name, os.fspath(value) if isinstance(value, os.PathLike) else str(value))


def expect(name: str, value: Any, ok: bool, accepted: str) -> None:
    """Raise SourceError for the value of an option that is not accepted."""
    if not ok:
        raise SourceError(f"{name}={value!r} is not accepted: expected {accepted}.")


def expect_number(name: str, value: Any, least: float, whole: bool = True) -> None:
    """Refuse an option that is not a number of at least ``least``."""
    kinds = int if whole else (int, float)
    ok = isinstance(value, kinds) and not isinstance(value, bool) and value >= least
    expect(name, value, ok, f"a {'whole ' * whole}number of at least {least}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A recognised source. It is picklable, so that any process can read any unit."""

    options: SourceOptions
    folder: Path  # of the source, resolved; absolute paths of images below it are read, too
    images: Path  # the folder that image paths are relative to, resolved
    format: str  # one of FORMATS
    has_spans: bool = False  # whether the first records have ``image_related_spans``
    total: int | None = None  # number of records, if it is known in advance
    origin: Mapping[str, str] = field(default_factory=dict)  # where others find it: ``source``, and its ``license``

    def bad_files(self) -> Iterator[BadFile]:
        """Yield files that are known to be unreadable without reading them through."""
        return iter(())

    def units(self) -> Iterator[Any]:
        """Yield units of work in a fixed order; each is small, picklable and identified by its ``repr``."""
        raise NotImplementedError

    def read(self, unit: Any) -> Iterator[Record | Rejected]:
        """Yield the records of one unit, in a fixed order."""
        raise NotImplementedError


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


def may_be_image(name: Any) -> bool:
    """Return whether a field may name an image, though by none of the usual names."""
    return str(name).lower().startswith(("image", "img")) and name not in (*CHAT_IMAGE_COLUMNS, SPANS)


def pick_columns(names: Sequence[str], options: SourceOptions, where: str) -> tuple[str | None, str | None]:
    """Return the columns of images and captions, or raise SourceError if one is missing.

    With ``learn`` each may be None: there is no column of images, or the text is made of several columns.
    """
    if options.learn is not None:
        image = options.image_column or next((name for name in CHAT_IMAGE_COLUMNS if name in names), None)
        if image not in (None, "none"):
            pick(names, image, (), "image_column", where)
        made = {"text_list", "image_info"} <= {*names} or ("question" in names and {*names} & {*ANSWER_COLUMNS})
        if made and not {*names} & {*CHAT_COLUMNS} and options.caption_column is None:
            return options.image_column, None
        caption = pick(names, options.caption_column, CHAT_COLUMNS, "caption_column", where)
        if image is None and (other := next(filter(may_be_image, names), None)) is not None:
            remedy = "choose it with image_column=, or read text alone with image_column=none"
            raise SourceError(f"{where}: no column of images, but {other}; {remedy}.")
        return image, caption
    image = pick(names, options.image_column, IMAGE_COLUMNS, "image_column", where)
    return image, pick(names, options.caption_column, CAPTION_COLUMNS, "caption_column", where)


def load(module: str) -> Any:
    """Import an optional package, or raise one line with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        needed = f"the package {module.split('.')[0]}: pip install 'composer-prior[convert]'"
        raise SourceError(f"Reading this source needs {needed}.") from error


class Seen:
    """A set of identities, stored as 8-byte hashes in a temporary sqlite file, in bounded memory."""

    def __init__(self) -> None:
        self._digests = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_SEEN_CACHE_KIB}"):
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
