"""Image-caption pairs as people keep them: one small reader per form, all yielding the same records.

A source is cut into units of work by :meth:`Source.units`, which is cheap, deterministic and runs in one process;
:meth:`Source.read` turns one unit into records, in any process. Neither ever holds more than one unit (COCO's JSON,
which has to be joined, is read whole).

| form | what it is |
| --- | --- |
| ``jsonl``, ``csv``, ``tsv`` | a file of captions beside a folder of images, one record per line |
| ``json`` | a JSON array: LLaVA's pre-training ``conversations``, or ``{"image": ..., "caption": ...}`` |
| ``coco`` | COCO captions: ``{"images": [...], "annotations": [...]}`` |
| ``webdataset`` | tar shards (img2dataset, LAION, CC12M) |
| ``parquet`` | Parquet files with image bytes or paths |
| ``hf`` | a Hugging Face dataset saved with ``save_to_disk`` |

What cannot be read never stops a reader: it yields a :class:`Rejected` in its place.
"""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import os
import re
import sqlite3
import stat
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

__all__ = ["FORMS", "Record", "Rejected", "Source", "SourceError", "SourceOptions", "open_source", "read_image"]

FORMS = ("jsonl", "csv", "tsv", "json", "coco", "webdataset", "parquet", "hf")
SPANS = "image_related_spans"

_ACCEPTED = (
    "a folder with captions.jsonl, captions.csv, captions.tsv or captions.json, such a file itself, COCO captions or "
    "LLaVA JSON, .tar shards, .parquet files, or a Hugging Face dataset saved to disk"
)
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".tar": "webdataset",
    ".tgz": "webdataset",
    ".tar.gz": "webdataset",
    ".parquet": "parquet",
}
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "svg", "avif", "jxl", "heic")
_IMAGE_COLUMNS = ("image", "image_path", "image_file", "file_name", "filename", "filepath", "path", "img", "jpg", "png")
_CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences", "description")
_KEY_COLUMNS = ("id", "key", "__key__")
_LINE_LIMIT = 16 << 20
_PADDING = re.compile(r"[ \t\r\n,]*")
_ROWS_AT_ONCE = 32
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


def open_source(path: str | Path, options: SourceOptions | None = None, **overrides: Any) -> Source:
    """Recognises the form of a source and opens it.

    Args:
        path: a file or a folder, see the module's table; or a remote (``s3://`` …) with tar shards or Parquet files.
        options: how to read it.
        overrides: fields of :class:`SourceOptions`.

    Returns:
        The source.

    Raises:
        SourceError: naming what is accepted, if the form is unknown or ambiguous, a column is missing, or an optional
            package is.
    """
    options = replace(options or SourceOptions(), **overrides)
    if is_remote(path):
        from composer_prior.data.remote_source import RemoteSource  # imports streaming, which takes its time

        return RemoteSource.open(str(path), options)
    path = Path(path).expanduser()
    form, files = _recognise(path, options.form)
    if form in ("webdataset", "parquet"):
        root = path if path.is_dir() else path.parent
        if form == "webdataset":
            return TarSource.open(root, files, options)
        return ParquetSource.open(root, files, options)
    if form == "hf":
        return HFSource.open(path, options)
    return ListSource.open(files[0], form, options)


def is_remote(path: str | Path) -> bool:
    """Whether a path names a remote of streaming rather than a file or folder of this machine."""
    return "://" in str(path) or str(path).startswith("dbfs:")


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


class RejectedImage(ValueError):
    """An image that is not to be read; ``reason`` and ``detail`` as in :class:`Rejected`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


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


# recognition ----------------------------------------------------------------------------------------------------------


def _suffix_form(path: Path) -> str | None:
    name = path.name.lower()
    return next((form for suffix, form in _SUFFIXES.items() if name.endswith(suffix)), None)


def _recognise(path: Path, wanted: str | None) -> tuple[str, list[Path]]:
    """The form of a source and the files that make it up."""
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder. Accepted: {_ACCEPTED}.")
    found = _folder_forms(path) if path.is_dir() else _file_forms(path)
    if wanted is not None:
        # A file of unusual name is taken at its word; in a folder the form picks among what is there.
        if not path.is_dir():
            return wanted, [path]
        found = {form: files for form, files in found.items() if form == wanted}
    if not found:
        raise SourceError(f"{path}: no {wanted or 'captions'} found here. Accepted: {_ACCEPTED}.")
    if len(found) > 1:
        raise SourceError(f"{path}: ambiguous, it holds {', '.join(found)}: choose with form=, or name the file.")
    form, files = next(iter(found.items()))
    if form not in ("webdataset", "parquet", "hf") and len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise SourceError(f"{path}: ambiguous, it holds {len(files)} {form} files ({names}): name the one to convert.")
    return form, files


def _file_forms(path: Path) -> dict[str, list[Path]]:
    form = _suffix_form(path)
    if form == "json":
        form = _json_form(path)
    return {form: [path]} if form else {}


def _folder_forms(path: Path) -> dict[str, list[Path]]:
    names = {file.name for file in path.iterdir()}
    if {"dataset_dict.json"} & names or {"dataset_info.json", "state.json"} <= names:
        return {"hf": [path]}
    if "index.json" in names and any(name.endswith(".mds") for name in names):
        raise SourceError(f"{path}: this is an MDS data set already; train on it as it is. Accepted: {_ACCEPTED}.")
    named = [path / f"captions{suffix}" for suffix in _SUFFIXES if f"captions{suffix}" in names]
    if named:
        return _merge(_file_forms(file) for file in named)
    if archives := archives_of(path.rglob("*")):
        return archives
    return _merge(_file_forms(file) for file in sorted(path.iterdir()) if file.is_file() and _suffix_form(file))


def archives_of(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The tar shards and the Parquet files among some, in order, by form."""
    found = _merge(
        {form: [file]} for file in sorted(files) if (form := _suffix_form(file)) in ("webdataset", "parquet")
    )
    # img2dataset lays its metadata beside each tar, as 00000.parquet; it is not a second source.
    stems = {file.with_suffix("") for file in found.get("webdataset", [])}
    own = [file for file in found.pop("parquet", []) if file.with_suffix("") not in stems]
    return {**found, **({"parquet": own} if own else {})}


def _merge(forms: Iterable[dict[str, list[Path]]]) -> dict[str, list[Path]]:
    merged: dict[str, list[Path]] = {}
    for found in forms:
        for form, files in found.items():
            merged.setdefault(form, []).extend(files)
    return merged


def _json_form(path: Path) -> str | None:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        head = file.read(4096).lstrip()
    return {"[": "json", "{": "coco"}.get(head[:1])


def _pick(names: Sequence[str], wanted: str | None, usual: Sequence[str], option: str, where: str) -> str:
    """The column to use: the one asked for, or the first of the usual names that is there."""
    chosen = wanted or next((name for name in usual if name in names), None)
    if chosen is None or chosen not in names:
        listed = ", ".join(map(str, names)) or "none"
        problem = f"no column {wanted!r}" if wanted else f"no column named {' or '.join(usual[:3])}"
        raise SourceError(f"{where}: {problem}; choose one of its columns ({listed}) with {option}=.")
    return chosen


def _load(module: str) -> Any:
    """An optional package, or one line that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise SourceError(
            f"Reading this source needs the package {package}: pip install 'composer-prior[convert]'."
        ) from error


# lists of captions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListSource:
    """A file that lists images by path: JSONL, CSV, TSV, a JSON array (LLaVA's too), COCO captions.

    Lines that follow each other and name the same image are the captions of one record.
    """

    file: Path
    form: str
    images: Path
    options: SourceOptions
    has_spans: bool = False
    total: int | None = None

    @classmethod
    def open(cls, file: Path, form: str, options: SourceOptions) -> ListSource:
        source = cls(file, form, file.parent, options)
        first = [item for item, _ in zip(source._entries(), range(1000), strict=False)]
        records = [item for item in first if isinstance(item, Record)]
        images = _images_folder(file, options.images, [str(record.image) for record in records[:20]])
        return replace(source, images=images, has_spans=any(record.spans is not None for record in records))

    def units(self) -> Iterator[tuple[Record | Rejected, ...]]:
        unit: list[Record | Rejected] = []
        for item in _unique(_grouped(self._entries())):
            unit.append(item)
            if len(unit) >= self.options.unit_samples:
                yield tuple(unit)
                unit = []
        if unit:
            yield tuple(unit)

    def read(self, unit: tuple[Record | Rejected, ...]) -> Iterator[Record | Rejected]:
        return iter(unit)

    def _entries(self) -> Iterator[Record | Rejected]:
        readers: dict[str, Callable[[Path, SourceOptions], Iterator[Record | Rejected]]] = {
            "jsonl": _read_jsonl,
            "csv": _read_table,
            "tsv": _read_table,
            "json": _read_json_array,
            "coco": _read_coco,
        }
        return readers[self.form](self.file, self.options)


def _images_folder(file: Path, asked: str | None, names: list[str]) -> Path:
    """The folder that image paths are relative to: the one asked for, or the first likely one that has an image."""
    if asked is not None:
        folder = Path(asked).expanduser()
        if not folder.is_dir():
            raise SourceError(f"images={asked}: no such folder.")
        return folder.resolve()
    # captions_train2017.json of COCO lies in annotations/, beside train2017/.
    split = file.stem.removeprefix("captions_")
    here = file.parent
    likely = [here, here / "images", here / split, here.parent / split, here.parent / "images"]
    for folder in likely:
        root = folder.resolve()
        if any(_exists(root, name) for name in names):
            return root
    return here.resolve()


def _exists(root: Path, name: str) -> bool:
    try:
        return os.path.exists(inside(root, name))
    except (RejectedImage, OSError, ValueError):
        return False


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; ``None`` stands for one that is too long to be held."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LINE_LIMIT):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) == _LINE_LIMIT and not line.endswith(b"\n"):
                while (rest := file.readline(_LINE_LIMIT)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            else:
                yield number, line


def _read_jsonl(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    for number, line in _lines(path):
        where, key = f"{path.name}:{number}", f"line {number}"
        if line is None:
            yield Rejected(key, "line too long", where, f"at most {_LINE_LIMIT} bytes are accepted")
            continue
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Rejected(key, "invalid UTF-8", where, f"byte {error.start} of the line")
        except (ValueError, RecursionError) as error:
            yield Rejected(key, "malformed JSON", where, str(error)[:200])
        else:
            yield _entry(entry, key, where, options)


def _read_table(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    csv.field_size_limit(max(csv.field_size_limit(), _LINE_LIMIT))
    lines = (("\ufffd" if line is None else line.decode("utf-8", "surrogateescape")) for _, line in _lines(path))
    tabs = path.suffix.lower() == ".tsv" or options.form == "tsv"
    rows = csv.reader(lines, delimiter="\t" if tabs else ",")
    header = next(rows, [])
    image = _pick(header, options.image_column, _IMAGE_COLUMNS, "image_column", path.name)
    caption = _pick(header, options.caption_column, _CAPTION_COLUMNS, "caption_column", path.name)
    chosen = replace(options, image_column=image, caption_column=caption)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Rejected(f"line {rows.line_num}", "malformed row", f"{path.name}:{rows.line_num}", str(error))
            continue
        where, key = f"{path.name}:{rows.line_num}", f"line {rows.line_num}"
        if not row:
            continue
        if len(row) != len(header):
            yield Rejected(key, "malformed row", where, f"{len(row)} cells where the header has {len(header)}")
            continue
        entry: dict[str, Any] = dict(zip(header, row, strict=True))
        if SPANS in entry:
            try:
                entry[SPANS] = json.loads(entry[SPANS] or "null")
            except (ValueError, RecursionError):
                yield Rejected(key, "bad spans", where, "not JSON")
                continue
        yield _entry(entry, key, where, chosen)


def _read_json_array(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    for number, entry in enumerate(_json_array(path)):
        where, key = f"{path.name}[{number}]", f"item {number}"
        if isinstance(entry, dict) and "conversations" in entry:
            entry = _conversation(entry)
        yield entry if isinstance(entry, Rejected) else _entry(entry, key, where, options)


def _json_array(path: Path, chunk: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """The items of a JSON array of objects, read a piece at a time."""
    decoder, number, position = json.JSONDecoder(), 0, 0
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        buffer = file.read(chunk).lstrip().removeprefix("[")
        while True:
            position = _PADDING.match(buffer, position).end()  # type: ignore[union-attr]
            if buffer.startswith("]", position):
                return
            try:
                if position < len(buffer) and not buffer.startswith("{", position):
                    raise SourceError(f"{path}: item {number} is not an object; a JSON array of objects is accepted.")
                item, position = decoder.raw_decode(buffer, position)
            except (json.JSONDecodeError, RecursionError) as error:
                held = len(buffer) - position
                more = file.read(max(chunk, held)) if held < _LINE_LIMIT else ""
                if not more:
                    raise SourceError(f"{path}: malformed JSON in item {number}; mend the file.") from error
                buffer, position = buffer[position:] + more, 0
                continue
            yield item
            number += 1


def _conversation(entry: dict[str, Any]) -> dict[str, Any]:
    """A LLaVA pre-training conversation as an entry with a caption; what is not one image and one answer has none."""
    turns = entry["conversations"]
    try:
        (human, asked), (model, answer) = [(turn["from"], turn["value"]) for turn in turns]
        if human == "human" and model == "gpt" and "<image>" in asked:
            return {**entry, "caption": answer}
    except (TypeError, KeyError, ValueError):
        pass
    return {**entry, "caption": None}


def _read_coco(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            data = json.load(file)
        images, annotations = data["images"], data["annotations"]
        by_image: dict[Any, list[dict[str, Any]]] = {}
        for annotation in annotations:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        entries = [(image["id"], image["file_name"]) for image in images]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: not COCO captions, which need 'images' (id, file_name) and 'annotations' (image_id, caption): "
            f"{type(error).__name__} {error}."
        ) from error
    name = options.caption_column or "caption"
    for number, (image_id, file_name) in enumerate(entries):
        where = f"{path.name}:images[{number}]"
        found = by_image.pop(image_id, [])
        if not isinstance(file_name, str):
            yield Rejected(str(image_id), "missing image", where, "file_name is not text")
            continue
        captions = tuple(annotation.get(name) for annotation in found)
        spans = tuple(a.get(SPANS) for a in found) if any(SPANS in a for a in found) else None
        yield Record(str(image_id), file_name, captions, where, spans, explicit=True)
    known = {image_id for image_id, _ in entries}
    for image_id, orphans in by_image.items():
        if image_id not in known:
            for orphan in orphans:
                key = str(orphan.get("id", image_id))
                yield Rejected(key, "unknown image id", f"{path.name}:annotations", f"image_id {image_id!r}")


def _entry(entry: Any, key: str, where: str, options: SourceOptions) -> Record | Rejected:
    """A record from one JSON object or one row of a table."""
    if not isinstance(entry, dict):
        return Rejected(key, "malformed record", where, "not an object")
    image = _value(entry, options.image_column, _IMAGE_COLUMNS)
    own = _value(entry, options.key_column, _KEY_COLUMNS)
    name = str(own) if isinstance(own, (str, int)) and str(own) else None
    if not isinstance(image, str) or not image:
        return Rejected(name or key, "missing image", where, "no path of an image")
    captions, spans = _several(_value(entry, options.caption_column, _CAPTION_COLUMNS), entry.get(SPANS))
    return Record(name or image, image, captions, where, spans if SPANS in entry else None, name is not None)


def _value(entry: dict[str, Any], wanted: str | None, usual: Sequence[str]) -> Any:
    return entry.get(wanted) if wanted else next((entry[name] for name in usual if name in entry), None)


def _several(caption: Any, spans: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """One caption or a list of them, with as many lists of spans."""
    if not isinstance(caption, (list, tuple)):
        return (() if caption is None else (caption,)), (spans,)
    return tuple(caption), tuple(spans) if isinstance(spans, list) and len(spans) == len(caption) else (spans,) * len(
        caption
    )


def _grouped(entries: Iterable[Record | Rejected]) -> Iterator[Record | Rejected]:
    """Joins neighbouring records of the same key and image into one record with all their captions."""

    def same(item: Record | Rejected) -> Any:
        return (item.key, item.image) if isinstance(item, Record) else object()

    for _, group in groupby(entries, same):
        items = list(group)
        first = items[0]
        if len(items) == 1 or isinstance(first, Rejected):
            yield from items
            continue
        records: list[Record] = []
        for item in items:
            if not isinstance(item, Record):
                continue
            if first.explicit and any(item.captions == record.captions for record in records):
                yield Rejected(item.key, "duplicate key", item.where, "with the same caption")
            else:
                records.append(item)
        captions = tuple(caption for record in records for caption in (record.captions or (None,)))
        spans = [span for r in records for span in (r.spans or (None,) * max(len(r.captions), 1))]
        yield replace(
            first, captions=captions, spans=tuple(spans) if any(r.spans is not None for r in records) else None
        )


def _unique(items: Iterable[Record | Rejected]) -> Iterator[Record | Rejected]:
    """Rejects an id that came before, and, where a source has no ids, an image with a caption that it had before."""
    seen = _Seen()
    for item in items:
        if isinstance(item, Rejected):
            yield item
        elif item.explicit:
            if seen.add(item.key):
                yield item
            else:
                yield Rejected(item.key, "duplicate key", item.where)
        else:
            fresh = [seen.add(item.image, caption) for caption in item.captions]
            if all(fresh):
                yield item
                continue
            kept = [index for index, new in enumerate(fresh) if new]
            for _ in range(len(fresh) - len(kept)):
                yield Rejected(item.key, "duplicate key", item.where, "this image had this caption before")
            if kept:
                spans = None if item.spans is None else tuple(item.spans[index] for index in kept)
                yield replace(item, captions=tuple(item.captions[index] for index in kept), spans=spans)


class _Seen:
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


# WebDataset -----------------------------------------------------------------------------------------------------------


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


def _file_unit(root: Path, file: Path) -> FileUnit | Rejected:
    name = file.relative_to(root).as_posix()
    try:
        status = os.stat(inside(root.resolve(), name))
    except RejectedImage as error:
        return Rejected(name, error.reason, name, error.detail)
    except OSError as error:
        return Rejected(name, "unreadable file", name, error.strerror or str(error))
    return FileUnit(name, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class TarSource:
    """WebDataset shards: members that follow each other and share a name up to its first dot are one sample."""

    root: Path
    files: tuple[Path, ...]
    options: SourceOptions
    has_spans: bool = False
    total: int | None = None
    form: str = field(default="webdataset", init=False)

    @property
    def images(self) -> Path:
        return self.root

    @classmethod
    def open(cls, root: Path, files: list[Path], options: SourceOptions) -> TarSource:
        source = cls(root, tuple(files), options)
        first = next(source.units())
        records = [item for item, _ in zip(source.read(first), range(100), strict=False) if isinstance(item, Record)]
        return replace(source, has_spans=any(record.spans is not None for record in records))

    def units(self) -> Iterator[FileUnit | Rejected]:
        return (_file_unit(self.root, file) for file in self.files)

    def read(self, unit: FileUnit | Rejected) -> Iterator[Record | Rejected]:
        if isinstance(unit, Rejected):
            yield unit
            return
        members: dict[str, bytes] = {}
        current, seen, problem = "", set(), None
        for name, data in _tar_members(self.root / unit.name, unit.name, self.options):
            if isinstance(data, Rejected):
                yield data
                continue
            key, _, suffix = _split_name(name)
            if not suffix:
                continue
            if key != current:
                if current:
                    yield self._record(current, members, unit.name, problem)
                current, members, problem = key, {}, "duplicate key" if key in seen else None
                seen.add(key)
            if suffix in members:
                problem = "duplicate key"
            members[suffix] = data
        if current:
            yield self._record(current, members, unit.name, problem)

    def _record(self, key: str, members: dict[str, bytes], name: str, problem: str | None) -> Record | Rejected:
        where = f"{name}:{key}"
        if problem:
            return Rejected(key, problem, where)
        options = self.options
        images = [options.image_column] if options.image_column else [s for s in members if s in _IMAGE_SUFFIXES]
        images = [suffix for suffix in images if suffix in members]
        if len(images) != 1:
            reason = "several images" if images else "missing image"
            return Rejected(key, reason, where, f"members: {', '.join(members)}"[:200])
        entry: dict[str, Any] = {}
        if "json" in members:
            try:
                parsed = json.loads(members["json"].decode("utf-8"))
                entry = parsed if isinstance(parsed, dict) else {}
            except UnicodeDecodeError:
                return Rejected(key, "invalid UTF-8", where, "in its .json")
            except (ValueError, RecursionError) as error:
                return Rejected(key, "malformed JSON", where, str(error)[:200])
        suffix = next((s for s in (options.caption_column, "txt", "caption", "text") if s and s in members), None)
        if suffix and not (options.caption_column and options.caption_column != suffix):
            caption: Any = members[suffix].decode("utf-8", "surrogateescape")
        else:
            caption = _value(entry, options.caption_column, _CAPTION_COLUMNS)
        captions, spans = _several(caption, entry.get(SPANS))
        return Record(key, members[images[0]], captions, where, spans if SPANS in entry else None)


def _split_name(name: str) -> tuple[str, str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, dot, suffix.lower()


def _tar_members(path: Path, label: str, options: SourceOptions) -> Iterator[tuple[str, bytes | Rejected]]:
    """Name and bytes of each regular member, in order, never more than one of them in memory.

    ``tarfile`` takes a damaged header within an archive for its end, or, told to ignore it, does not say so. Here what
    lies between two members is rejected unless it is zeros, as between archives that were joined, and reading goes on.
    """
    wanted = {*_IMAGE_SUFFIXES, "json", "txt", "caption", "text", options.image_column, options.caption_column}
    try:
        with tarfile.open(path, "r:*", ignore_zeros=True) as tar:
            end = 0
            while True:
                member = tar.next()
                tar.members.clear()  # type: ignore[attr-defined]
                if lost := _lost(tar, end, None if member is None else member.offset):
                    yield "", Rejected(label, "broken archive", label, lost)
                if member is None:
                    return
                end = tar.offset
                if member.isdir():
                    continue
                name, where = member.name, f"{label}:{member.name}"
                if not member.isfile():
                    yield name, Rejected(name, "not a regular file", where)
                elif name.startswith("/") or ".." in PurePosixPath(name).parts:
                    detail = "absolute paths and '..' are refused"
                    yield name, Rejected(name, "path leaves the source", where, detail)
                elif _split_name(name)[2] in wanted:
                    if member.size > options.max_image_bytes:
                        yield name, Rejected(name, "image too large", where, f"{member.size} bytes")
                        continue
                    file = tar.extractfile(member)
                    yield name, (file.read() if file else b"")
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        yield "", Rejected(label, "broken archive", label, f"{str(error)[:160]}; what follows in it is not read")


def _lost(tar: tarfile.TarFile, begin: int, end: int | None) -> str:
    """What is wrong between two places of an archive where one member ends and the next begins, or the archive ends."""
    if begin == end:
        return ""
    assert tar.fileobj is not None
    tar.fileobj.seek(begin)
    size, damaged = 0, False
    while piece := tar.fileobj.read(min(1 << 20, sys.maxsize if end is None else end - begin - size)):
        size += len(piece)
        damaged = damaged or bool(piece.strip(b"\0"))
    if damaged:
        return f"{size} bytes at {begin} are no members"
    return "no end of archive where the last readable member ends" if end is None and size < tarfile.BLOCKSIZE else ""


# Parquet and Arrow ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files; a unit is a run of row groups."""

    root: Path
    files: tuple[Path, ...]
    options: SourceOptions
    image: str
    caption: str
    images: Path
    has_spans: bool = False
    total: int | None = None
    form: str = field(default="parquet", init=False)

    @classmethod
    def open(cls, root: Path, files: list[Path], options: SourceOptions) -> ParquetSource:
        parquet, arrow = _load("pyarrow.parquet"), _load("pyarrow")
        for file in files:
            try:
                names = parquet.read_schema(file).names
            except (arrow.ArrowException, OSError):
                continue
            image = _pick(names, options.image_column, _IMAGE_COLUMNS, "image_column", file.name)
            caption = _pick(names, options.caption_column, _CAPTION_COLUMNS, "caption_column", file.name)
            if options.key_column:
                _pick(names, options.key_column, (), "key_column", file.name)
            images = Path(options.images).expanduser() if options.images else root
            return cls(root, tuple(files), options, image, caption, images.resolve(), SPANS in names)
        raise SourceError(f"{root}: none of its {len(files)} Parquet files can be read.")

    def units(self) -> Iterator[FileUnit | Rejected]:
        parquet, arrow = _load("pyarrow.parquet"), _load("pyarrow")
        seen = _Seen()
        for file in self.files:
            whole = _file_unit(self.root, file)
            if isinstance(whole, Rejected):
                yield whole
                continue
            try:
                with parquet.ParquetFile(file) as opened:
                    yield from self._cut(whole, opened, seen)
            except (arrow.ArrowException, OSError, KeyError) as error:
                yield Rejected(whole.name, "unreadable file", whole.name, _one_line(error))

    def _cut(self, whole: FileUnit, opened: Any, seen: _Seen) -> Iterator[FileUnit]:
        first, row, rows = 0, 0, 0
        for group in range(opened.num_row_groups):
            rows += opened.metadata.row_group(group).num_rows
            if rows >= self.options.unit_samples or group == opened.num_row_groups - 1:
                yield replace(
                    whole, first=first, last=group + 1, row=row, repeated=self._repeated(opened, first, group + 1, seen)
                )
                first, row, rows = group + 1, row + rows, 0

    def _repeated(self, opened: Any, first: int, last: int, seen: _Seen) -> tuple[int, ...]:
        """Rows whose key came before. Only the column of keys is read."""
        if self.options.key_column is None:
            return ()
        table = opened.read_row_groups(range(first, last), columns=[self.options.key_column])
        keys = table.column(0).to_pylist()
        return tuple(number for number, key in enumerate(keys) if not seen.add(key))

    def read(self, unit: FileUnit | Rejected) -> Iterator[Record | Rejected]:
        if isinstance(unit, Rejected):
            yield unit
            return
        parquet, arrow = _load("pyarrow.parquet"), _load("pyarrow")
        columns = [self.image, self.caption, *filter(None, [self.options.key_column]), *[SPANS] * self.has_spans]
        repeated, number, rows = set(unit.repeated), 0, 0
        try:
            with parquet.ParquetFile(self.root / unit.name, buffer_size=1 << 20) as file:
                rows = sum(file.metadata.row_group(group).num_rows for group in range(unit.first, unit.last))
                groups = range(unit.first, unit.last)
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False):
                    for entry in _batch_rows(batch):
                        key, where = str(unit.row + number), f"{unit.name}:{unit.row + number}"
                        yield _row(entry, self.image, self.caption, self.options, key, where, number in repeated)
                        number += 1
        except (arrow.ArrowException, OSError) as error:
            for lost in range(unit.row + number, unit.row + max(rows, number + 1)):
                yield Rejected(str(lost), "unreadable row", f"{unit.name}:{lost}", _one_line(error))


def _batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow batch; text that is not UTF-8 keeps its bad bytes as surrogates instead of failing."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        arrow = _load("pyarrow")
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            yield {name: _scalar(arrow, column[0]) for name, column in zip(row.schema.names, row.columns, strict=True)}


def _scalar(arrow: Any, value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if arrow.types.is_list(value.type) or arrow.types.is_large_list(value.type):
            return [_scalar(arrow, item) for item in value.values]
        return (
            value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape") if hasattr(value, "as_buffer") else None
        )


def _row(
    entry: dict[str, Any], image: str, caption: str, options: SourceOptions, number: str, where: str, repeated: bool
) -> Record | Rejected:
    """A record from one row of a table that may hold image bytes."""
    own = entry.get(options.key_column) if options.key_column else None
    key = number if own is None else str(own)
    if repeated:
        return Rejected(key, "duplicate key", where)
    value = entry.get(image)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, str)) or not value:
        return Rejected(key, "missing image", where)
    captions, spans = _several(entry.get(caption), entry.get(SPANS))
    return Record(key, value, captions, where, spans if SPANS in entry else None)


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]


@dataclass(frozen=True)
class HFSource:
    """A Hugging Face dataset saved with ``save_to_disk``; a unit is a run of rows."""

    path: Path
    options: SourceOptions
    image: str
    caption: str
    images: Path
    total: int | None
    has_spans: bool
    form: str = field(default="hf", init=False)

    @classmethod
    def open(cls, path: Path, options: SourceOptions) -> HFSource:
        data = _load_saved(path, options.split)
        image = _pick(data.column_names, options.image_column, _IMAGE_COLUMNS, "image_column", str(path))
        caption = _pick(data.column_names, options.caption_column, _CAPTION_COLUMNS, "caption_column", str(path))
        if options.key_column:
            _pick(data.column_names, options.key_column, (), "key_column", str(path))
        images = Path(options.images).expanduser() if options.images else path
        return cls(path, options, image, caption, images.resolve(), len(data), SPANS in data.column_names)

    def units(self) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
        data, seen = _load_saved(self.path, self.options.split), _Seen()
        for start in range(0, len(data), self.options.unit_samples):
            stop = min(start + self.options.unit_samples, len(data))
            keys = data.select_columns(self.options.key_column)[start:stop] if self.options.key_column else {}
            repeated = [n for n, key in enumerate(next(iter(keys.values()), ())) if not seen.add(key)]
            yield data._fingerprint, start, stop, tuple(repeated)

    def read(self, unit: tuple[str, int, int, tuple[int, ...]]) -> Iterator[Record | Rejected]:
        _, start, stop, again = unit
        repeated = set(again)
        data = _load_saved(self.path, self.options.split).with_format("arrow")
        names = [self.image, self.caption, *filter(None, [self.options.key_column]), *[SPANS] * self.has_spans]
        data, number = data.select_columns(list(dict.fromkeys(names))), start
        for begin in range(start, stop, _ROWS_AT_ONCE):
            for batch in data[begin : min(begin + _ROWS_AT_ONCE, stop)].to_batches():
                for entry in _batch_rows(batch):
                    where = f"row {number}"
                    is_repeated = number - start in repeated
                    yield _row(entry, self.image, self.caption, self.options, str(number), where, is_repeated)
                    number += 1


def _load_saved(path: Path, split: str | None) -> Any:
    """The one split of a saved dataset that is meant. Nothing in it is executed."""
    datasets = _load("datasets")
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise SourceError(f"{path}: not a readable Hugging Face dataset ({_one_line(error)}).") from error
    if not isinstance(data, datasets.DatasetDict):
        return data
    name = split or (next(iter(data)) if len(data) == 1 else None)
    if name not in data:
        raise SourceError(f"{path}: choose one of its splits ({', '.join(data)}) with split=.")
    return data[name]
