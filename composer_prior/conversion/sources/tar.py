"""WebDataset shards: tar archives of images and captions."""

import lzma
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from composer_prior.conversion.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    SPANS,
    BadFile,
    FileUnit,
    Record,
    Rejected,
    Source,
    SourceOptions,
)
from composer_prior.conversion.sources.files import beginning, file_unit, tar_problem
from composer_prior.conversion.sources.images import normal_form
from composer_prior.conversion.sources.records import decode_text, record_of, value_of
from composer_prior.data.files import parse_json
from composer_prior.data.images import ImageError, read_image_file

_TEXT_SUFFIXES = ("txt", "caption", "text")
NEIGHBOURS = (*_TEXT_SUFFIXES, "json")  # suffixes of text files beside images
_DOCUMENT = re.compile(r"readme|licen[cs]e|notice|changelog|copying|thumbs|desktop", re.IGNORECASE)
_MOST_UNPACKED = 200  # times the size of a compressed archive; images with captions reach 2
_MOST_NAMING = 1 << 20  # bytes of a header that names the next member
_ZEROS_BETWEEN = 1 << 20  # bytes of zeros accepted behind an archive; more indicate an incomplete download
_NO_SAMPLE, _NO_IMAGE, _NEITHER = "not a sample", "missing image", "neither image nor caption"
_WITHOUT_IMAGE = (_NO_SAMPLE, _NO_IMAGE, _NEITHER)


def _together(key: str) -> str:
    """Return the advice for a sample whose members are not adjacent."""
    unicode = "" if key.isascii() else ", after their names have one Unicode form, as convmv --nfc gives them"
    return f"the members of a sample must stand together: pack the archive again, with tar --sort=name{unicode}"


@dataclass(frozen=True, kw_only=True)
class TarSource(Source):
    """WebDataset shards: consecutive members that share a name up to its first dot are one sample.

    If these have no image (``photo.v1.jpg``, ``photo.v1.txt``, ``photo.v2.jpg`` …), and for a pair of image and
    caption, the name extends to its last dot. Every member belongs to a sample or is rejected; a member whose name is
    not that of a sample (hidden, without a suffix, a readme) is listed and does not count.
    """

    files: tuple[Path, ...]
    format: str = "webdataset"

    def members(self, unit: Any, wanted: Collection[str | None]) -> Iterator[tuple[str, bytes | Rejected | None]]:
        """Yield name and content of each member in order, without the content of unwanted ones."""
        return _tar_members(self.folder / unit.name, unit.name, wanted, self.options.max_image_bytes)

    @classmethod
    def open(cls, root: Path, files: list[Path], options: SourceOptions) -> "TarSource":
        source = cls(files=tuple(files), options=options, folder=root, images=root)
        for unit in source.units():
            if records := [item for item in islice(source.read(unit), 100) if isinstance(item, Record)]:
                return replace(source, has_spans=any(record.spans is not None for record in records))
        return source

    def bad_files(self) -> Iterator[BadFile]:
        for unit in self.units():
            bad = unit if isinstance(unit, BadFile) else self._cut(unit)
            if bad is not None:
                yield bad

    def _cut(self, unit: FileUnit) -> BadFile | None:
        """Return a bad file for an archive without its end, from its headers alone."""
        path = self.folder / unit.name
        if beginning(path)[0][257:262] != b"ustar":
            return None  # compressed; it is checked when it is read
        with open(path, "rb") as file:
            file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
            if not file.read().strip(b"\0"):
                return None
        members = (item for _, item in _tar_members(path, unit.name, (), self.options.max_image_bytes))
        return next((item for item in members if isinstance(item, BadFile)), None)

    def units(self) -> Iterator[FileUnit | BadFile]:
        return (file_unit(self.folder, file, tar_problem, "broken archive") for file in self.files)

    def read(self, unit: FileUnit | BadFile) -> Iterator[Record | Rejected]:
        if isinstance(unit, BadFile):
            yield unit
            return
        wanted = {*IMAGE_SUFFIXES, *NEIGHBOURS, self.options.image_column, self.options.caption_column}
        group, seen = _Group(self, unit.name, "", set()), set[str]()
        for name, data in self.members(unit, wanted):
            if isinstance(data, Rejected):
                yield data
                continue
            key, suffix = _split_name(name)
            if not suffix:
                yield Rejected(name, _NO_SAMPLE, f"{unit.name}:{name}", "hidden, or without a suffix", count=0)
                continue
            if key != group.key:
                yield from group.end()
                group = _Group(self, unit.name, key, seen)
            yield from group.add(name, suffix, data, suffix in wanted)
        yield from group.end()

    def record(self, key: str, members: dict[str, bytes | None], where: str) -> Record | Rejected:
        """Return the sample of members with one name, by their suffixes."""
        options = self.options
        images = [options.image_column] if options.image_column else [s for s in members if s in IMAGE_SUFFIXES]
        images = [suffix for suffix in images if members.get(suffix) is not None]
        if len(images) != 1:
            listed = f"members: {', '.join(members)}"[:200]
            if images:
                return Rejected(key, "several images", where, f"{listed}; choose one with image_column=")
            if _DOCUMENT.fullmatch(key.rpartition("/")[2]) or (self.format == "folder" and list(members) == ["json"]):
                return Rejected(key, _NO_SAMPLE, where, listed, count=0)
            known = any(data is not None for data in members.values())
            return Rejected(key, _NO_IMAGE if known else _NEITHER, where, listed)
        entry: dict[str, Any] = {}
        if members.get("json"):
            try:
                parsed = parse_json(decode_text(members["json"] or b""))
                entry = parsed if isinstance(parsed, dict) else {}
            except ValueError as error:
                return Rejected(key, "malformed JSON", where, str(error)[:200])
        record = record_of(
            members[images[0]], self._caption(members, entry), entry.get(SPANS), key, where, has_spans=SPANS in entry
        )
        if isinstance(record, Rejected) or record.captions:
            return record
        others = ", ".join(name for name in {**members, **entry} if name not in (images[0], "json"))[:200]
        return replace(record, note=f"choose one of {others} with caption_column=" if others else self.missing(key))

    def missing(self, key: str) -> str:
        """Return advice for an image without a caption."""
        return _together(key)

    def _caption(self, members: dict[str, bytes | None], entry: dict[str, Any]) -> Any:
        """Return the caption of the text member or, if that is empty, of the JSON."""
        column = self.options.caption_column
        suffixes = (column,) if column else _TEXT_SUFFIXES
        texts = [decode_text(members[suffix] or b"").rstrip("\r\n") for suffix in suffixes if suffix in members]
        text = next((text for text in texts if text.strip()), None)
        caption = value_of(entry, column, CAPTION_COLUMNS) if text is None else text
        return texts[0] if caption is None and texts else caption


class _Group:
    """Consecutive members that share a name up to its first dot.

    Of names with more dots, only one pair of image and caption is held in memory at a time.
    """

    def __init__(self, source: TarSource, file: str, key: str, seen: set[str]):
        self.source, self.file, self.key, self.seen = source, file, key, seen
        self.members: dict[str, bytes | None] = {}
        self.twice = ""
        self.inner: _Group | None = None
        self.kept: list[Rejected] = []
        self.has_pairs = False

    def add(self, name: str, suffix: str, data: bytes | None, plain: bool) -> Iterator[Record | Rejected]:
        """Add one member; a pair of a longer name is complete when the next name begins."""
        key, _, last = normal_form(name).rpartition(".")
        if plain or "." not in suffix:
            self.twice = self.twice or (name if suffix in self.members else "")
            self.members[suffix] = data
            return
        if self.inner is None or self.inner.key != key:
            yield from self._end_inner()
            self.inner = _Group(self.source, self.file, key, self.seen)
        yield from self.inner.add(name, last.lower(), data, True)

    def end(self) -> Iterator[Record | Rejected]:
        """Yield the remaining records when a member of another name follows."""
        yield from self._end_inner()
        known = any(data is not None for data in self.members.values())
        if self.members and (known or not self.has_pairs):
            record = self._record()
            yield record
            if isinstance(record, Record) or record.reason not in _WITHOUT_IMAGE:
                return  # members of longer names are parts of this sample
        elif self.members:
            listed = f"members: {', '.join(self.members)}"[:200]
            yield Rejected(self.key, _NO_SAMPLE, f"{self.file}:{self.key}", listed, count=0)
        yield from self.kept

    def _end_inner(self) -> Iterator[Record | Rejected]:
        if self.inner is None:
            return
        record, self.inner = self.inner._record(), None
        if isinstance(record, Rejected):
            self.kept.append(record)
        elif not record.captions:
            self.kept.append(Rejected(record.key, "missing caption", record.where, record.note))
        else:
            self.has_pairs = True
            yield record

    def _record(self) -> Record | Rejected:
        where = f"{self.file}:{self.key}"
        if self.key in self.seen:
            return Rejected(self.key, "duplicate key", where, _together(self.key))
        self.seen.add(self.key)
        if self.twice:
            return Rejected(self.key, "duplicate key", where, f"several members {self.twice}")
        return self.source.record(self.key, self.members, where)


def _split_name(name: str) -> tuple[str, str]:
    """Return a member's name up to its first dot, and its lower-case suffix, which is empty if it is no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or "__MACOSX" in folder.split("/"):
        return name, ""
    return normal_form(folder + slash + stem), suffix.lower()


class _Files(NamedTuple):
    name: str  # of the folder
    files: tuple[tuple[str, int, int], ...]  # name, size and time of each; a changed file makes another unit


@dataclass(frozen=True, kw_only=True)
class FolderSource(TarSource):
    """A folder of images with text files of the same names, as of kohya, SimpleTuner and img2dataset.

    It is read like an archive of these files.
    """

    format: str = "folder"

    def bad_files(self) -> Iterator[BadFile]:
        return iter(())

    def units(self) -> Iterator[_Files]:  # type: ignore[override]
        unit, samples = list[tuple[str, int, int]](), 0
        named = ((*_split_name(file.relative_to(self.folder).as_posix()), file) for file in self.files)
        wanted = {*IMAGE_SUFFIXES, *NEIGHBOURS, self.options.image_column, self.options.caption_column}
        kept = sorted(entry for entry in named if entry[1].rpartition(".")[2] in wanted)
        for _, group in groupby(kept, lambda entry: entry[0]):
            for _, _, file in group:
                status = os.stat(file) if file.exists() else os.lstat(file)
                unit.append((file.relative_to(self.folder).as_posix(), status.st_size, status.st_mtime_ns))
            samples += 1
            if samples == self.options.unit_samples:
                yield _Files(self.folder.name, tuple(unit))
                unit, samples = [], 0
        if unit:
            yield _Files(self.folder.name, tuple(unit))

    def members(self, unit: _Files, wanted: Collection[str | None]) -> Iterator[tuple[str, bytes | Rejected | None]]:
        for name, _, _ in unit.files:
            try:
                yield name, read_image_file(self.folder / name, self.options.max_image_bytes)
            except ImageError as error:
                yield name, Rejected(name, error.reason, f"{unit.name}:{name}", error.detail)

    def missing(self, key: str) -> str:
        return f"no file of this name ends in {', '.join(f'.{suffix}' for suffix in NEIGHBOURS)} beside it"


class _Header(tarfile.TarInfo):
    """A header, read only if its size and the unpacked size of the archive are within bounds."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        most = max(64 << 20, _MOST_UNPACKED * os.path.getsize(archive.name or ""))
        if archive.offset > most:
            raise tarfile.ReadError(f"it unpacks to more than {most} bytes, {_MOST_UNPACKED} times its size")
        return super().fromtarfile(archive)  # type: ignore[return-value]

    def _proc_member(self, archive: tarfile.TarFile) -> Any:  # tarfile's hook for subclasses
        if self.type in (b"L", b"K", b"x", b"g", b"X") and not 0 <= self.size <= _MOST_NAMING:
            raise tarfile.ReadError(f"a header of {self.size} bytes, at most {_MOST_NAMING} are accepted")
        return super()._proc_member(archive)  # type: ignore[misc]


def _tar_members(
    path: Path, label: str, wanted: Collection[str | None], limit: int
) -> Iterator[tuple[str, bytes | Rejected | None]]:
    """Yield name and bytes of each regular member in order, one in memory at a time, without bytes of unwanted ones.

    ``tarfile`` takes a damaged header for the end of the archive, or ignores it silently. Here bytes between two
    members are rejected, unless they are zeros as between joined archives, and reading continues. They count as the
    number of samples that would fill them; an archive without a member, or without an end, is a bad file.
    """
    end, stems, last = 0, 0, ""
    first: tuple[int, str] | None = None  # bytes before the first member

    def damaged(size: int, problem: str) -> tuple[str, Rejected]:
        count = max(1, round(size * stems / max(1, end - (first[0] if first else 0))))
        return "", Rejected(label, "broken archive", label, problem, count, estimated=count > 1)

    try:
        with tarfile.open(path, "r:*", ignore_zeros=True, tarinfo=_Header) as tar:
            while True:
                member = tar.next()
                tar.members.clear()  # type: ignore[attr-defined]
                if member and tar.offset <= end:
                    raise tarfile.ReadError("a member of a negative size")
                size, problem = _lost(tar, end, None if member is None else member.offset)
                if problem and not stems:
                    first = size, problem
                elif problem and (member or size >= tarfile.BLOCKSIZE):
                    yield damaged(size, problem)
                if member is None:
                    if first:
                        bad = BadFile(label, "broken archive", label, f"not a tar archive: {first[1]}")
                        yield damaged(*first) if stems else ("", bad)
                    if size < tarfile.BLOCKSIZE:
                        cut = f"cut after {end + size} bytes, without an end of archive"
                        yield "", BadFile(label, "broken archive", label, cut)
                    return
                end = tar.offset
                if member.isdir():
                    continue
                name, where = member.name, f"{label}:{member.name}"
                stem, suffix = name.rpartition(".")[0], _split_name(name)[1]
                stems, last = stems + (stem != last), stem
                if not member.isfile():
                    detail = "a link; pack the archive with tar -h --hard-dereference" if member.linkname else ""
                    yield name, Rejected(name, "not a regular file", where, detail)
                elif name.startswith("/") or ".." in PurePosixPath(name).parts:
                    yield name, Rejected(name, "path leaves the source", where, "absolute paths and '..' are refused")
                elif suffix not in wanted and suffix.rpartition(".")[2] not in wanted:
                    yield name, None
                elif member.size > limit:
                    yield name, Rejected(name, "image too large", where, f"{member.size} bytes")
                else:
                    file = tar.extractfile(member)
                    yield name, (file.read() if file else b"")
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError) as error:
        if first and stems:
            yield damaged(*first)
        yield "", BadFile(label, "broken archive", label, f"cut or damaged behind byte {end} ({str(error)[:160]})")


def _lost(tar: tarfile.TarFile, begin: int, end: int | None) -> tuple[int, str]:
    """Return the size of the bytes between two members, or behind the last one, and their problem."""
    if begin == end:
        return 0, ""
    assert tar.fileobj is not None
    tar.fileobj.seek(begin)
    size, damaged = 0, False
    while piece := tar.fileobj.read(min(1 << 20, sys.maxsize if end is None else end - begin - size)):
        size += len(piece)
        damaged = damaged or bool(piece.strip(b"\0"))
    if damaged:
        return size, f"{size} bytes at {begin} are no members"
    return size, f"{size} bytes at {begin} are only zeros" if size > _ZEROS_BETWEEN else ""
