"""WebDataset shards: tar archives of images and captions."""

from __future__ import annotations

import json
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from composer_prior.data.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    SPANS,
    FileUnit,
    Record,
    Rejected,
    SourceOptions,
    file_unit,
    several,
    value_of,
)


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
        return (file_unit(self.root, file) for file in self.files)

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
        images = [options.image_column] if options.image_column else [s for s in members if s in IMAGE_SUFFIXES]
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
            caption = value_of(entry, options.caption_column, CAPTION_COLUMNS)
        captions, spans = several(caption, entry.get(SPANS))
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
    wanted = {*IMAGE_SUFFIXES, "json", "txt", "caption", "text", options.image_column, options.caption_column}
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
