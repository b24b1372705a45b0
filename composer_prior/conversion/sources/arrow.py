"""Arrow rows: Parquet files, Hugging Face datasets saved with ``save_to_disk``, and those of the Hub."""

import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from composer_prior.conversion.sources.base import (
    SPANS,
    BadFile,
    FileUnit,
    Record,
    Rejected,
    Seen,
    Source,
    SourceError,
    SourceOptions,
    load,
    pick,
    pick_columns,
)
from composer_prior.conversion.sources.files import beginning, describe, file_unit, kind_of, parquet_problem
from composer_prior.conversion.sources.records import chat_of, record_of
from composer_prior.data.messages import one_line

_ROWS_AT_ONCE = 32
_UNPACKED = 64 << 20  # bytes of a row group's columns that are accepted without a check
_HUB_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/([^/]+))?(?:/([^/]+))?/?")
_HUB_FORM = "hf://datasets/USER/NAME[@REVISION][/SUBSET][/SPLIT]"
_HUB_FILE = r"(zip://[^:]+::)?hf://datasets/{}@[^:]+"  # of a repository, or in an archive of it


@dataclass(frozen=True, kw_only=True)
class _ArrowSource(Source):
    """A table with a column of images, as bytes or paths, and one of captions."""

    columns: list[str]  # to be read

    def record(self, entry: dict[str, Any], number: int | str, where: str, repeated: bool) -> Record | Rejected:
        """Return the record of one row."""
        given = entry.get(self.options.key_column) if self.options.key_column else None
        key, spans = str(number if given is None else given), entry.get(SPANS)
        if self.options.learn is not None:
            chat = chat_of(entry, key, where, self.options, self.options.key_column is not None)
            return Rejected(key, "duplicate key", where) if repeated else chat
        image, caption = (entry.get(str(name)) for name in (self.options.image_column, self.options.caption_column))
        record = record_of(image, caption, spans, key, where, has_spans=SPANS in entry)
        if repeated and isinstance(record, Record):
            return Rejected(key, "duplicate key", where, count=max(1, len(record.captions)))
        return record


def _columns(names: list[str], options: SourceOptions, where: str, folder: Path) -> dict[str, Any]:
    """Return the fields of a source that depend on its columns."""
    image, caption = pick_columns(names, options, where)
    if options.key_column:
        pick(names, options.key_column, (), "key_column", where)
    wanted = (image, caption, options.key_column, SPANS) if caption else names
    return {
        "options": replace(options, image_column=image, caption_column=caption),
        "columns": [name for name in names if name in wanted],
        "images": options.images_folder() or folder.resolve(),
        "has_spans": SPANS in names,
    }


@dataclass(frozen=True, kw_only=True)
class ParquetSource(_ArrowSource):
    """Parquet files; a unit is a run of row groups."""

    root: Path
    files: tuple[Path, ...]
    format: str = "parquet"

    @classmethod
    def open(cls, root: Path, files: list[Path], options: SourceOptions) -> "ParquetSource":
        parquet, arrow = load("pyarrow.parquet"), load("pyarrow")
        bad: list[BadFile] = []
        for file in files:
            unit = file_unit(root, file, parquet_problem)
            try:
                if isinstance(unit, BadFile):
                    bad.append(unit)
                    continue
                names = parquet.read_schema(file).names
            except (arrow.ArrowException, OSError) as error:
                bad.append(BadFile.of(file.relative_to(root).as_posix(), one_line(error, 200)))
                continue
            fields = _columns(names, options, file.name, root)
            return cls(root=root, files=tuple(files), folder=root.resolve(), **fields)
        raise SourceError(f"{root}: none of its {len(files)} Parquet files can be read: {describe(bad)}.")

    def bad_files(self) -> Iterator[BadFile]:
        units = (file_unit(self.root, file, parquet_problem) for file in self.files)
        return (unit for unit in units if isinstance(unit, BadFile))

    def units(self) -> Iterator[FileUnit | BadFile]:
        parquet, arrow = load("pyarrow.parquet"), load("pyarrow")
        seen = Seen()
        for file in self.files:
            whole = file_unit(self.root, file, parquet_problem)
            if isinstance(whole, BadFile):
                yield whole
                continue
            rows, done = None, 0
            try:
                with parquet.ParquetFile(file) as opened:
                    rows = opened.metadata.num_rows
                    if self.options.key_column not in (None, *opened.schema_arrow.names):
                        raise LookupError(f"no column {self.options.key_column!r}")
                    for unit in self._cut(whole, opened, seen):
                        yield unit
                        done = unit.row + _rows(opened, range(unit.first, unit.last))
            except (arrow.ArrowException, OSError, LookupError) as error:
                yield BadFile.of(whole.name, one_line(error, 200), None if rows is None else rows - done)

    def _cut(self, whole: FileUnit, opened: Any, seen: Seen) -> Iterator[FileUnit]:
        first, row, rows = 0, 0, 0
        for group in range(opened.num_row_groups):
            rows += _rows(opened, [group])
            if rows >= self.options.unit_samples or group == opened.num_row_groups - 1:
                key = self.options.key_column
                batches = _batches(opened, range(first, group + 1), [key]) if key else ()
                yield replace(whole, first=first, last=group + 1, row=row, repeated=_repeated(batches, seen))
                first, row, rows = group + 1, row + rows, 0

    def read(self, unit: FileUnit | BadFile) -> Iterator[Record | Rejected]:
        if isinstance(unit, BadFile):
            yield unit
            return
        parquet, arrow = load("pyarrow.parquet"), load("pyarrow")
        number, rows = unit.row, 0
        repeated = {unit.row + index for index in unit.repeated}
        groups = range(unit.first, unit.last)
        try:
            with parquet.ParquetFile(self.root / unit.name, buffer_size=1 << 20) as file:
                rows = _rows(file, groups)
                for batch in _batches(file, groups, self.columns):
                    for entry in _entries(batch):
                        yield self.record(entry, number, f"{unit.name}:{number}", number in repeated)
                        number += 1
        except (arrow.ArrowException, OSError) as error:
            for lost in range(number, max(unit.row + rows, number + 1)):
                yield Rejected(str(lost), "unreadable row", f"{unit.name}:{lost}", one_line(error, 200))


@dataclass(frozen=True, kw_only=True)
class HFSource(_ArrowSource):
    """A Hugging Face dataset saved with ``save_to_disk``; a unit is a run of rows. A damaged one cannot be opened."""

    path: Path
    format: str = "hf"

    @classmethod
    def open(cls, path: Path, options: SourceOptions) -> "HFSource":
        data = _load_saved(path, options.split)
        fields = _columns(data.column_names, options, str(path), path)
        return cls(path=path, folder=path.resolve(), total=len(data), **fields)

    def units(self) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
        data, seen = _load_saved(self.path, self.options.split), Seen()
        names = [self.options.key_column] if self.options.key_column else []
        for start in range(0, len(data), self.options.unit_samples):
            stop = min(start + self.options.unit_samples, len(data))
            batches = data.with_format("arrow").select_columns(names)[start:stop].to_batches() if names else ()
            yield data._fingerprint, start, stop, _repeated(batches, seen)

    def read(self, unit: tuple[str, int, int, tuple[int, ...]]) -> Iterator[Record | Rejected]:
        _, start, stop, again = unit
        repeated = {start + index for index in again}
        data = _load_saved(self.path, self.options.split).with_format("arrow").select_columns(self.columns)
        number = start
        for begin in range(start, stop, _ROWS_AT_ONCE):
            for batch in data[begin : min(begin + _ROWS_AT_ONCE, stop)].to_batches():
                for entry in _entries(batch):
                    yield self.record(entry, number, f"row {number}", number in repeated)
                    number += 1


@dataclass(frozen=True, kw_only=True)
class HubSource(_ArrowSource):
    """A data set of the Hugging Face Hub, at one commit; a unit is a file of it, which is read as it is downloaded."""

    name: str  # USER/NAME
    revision: str  # the commit
    subset: str | None
    split: str
    shards: int
    format: str = "hf"

    @classmethod
    def open(cls, url: str, options: SourceOptions) -> "HubSource":
        """Open ``hf://datasets/USER/NAME[@REVISION][/SUBSET][/SPLIT]``."""
        match = _HUB_URL.fullmatch(url)
        if match is None or options.form not in (None, "hf"):
            raise SourceError(f"{url}: expected {_HUB_FORM}, without form=.")
        name, revision, first, second = (part and unquote(part) for part in match.groups())
        subset, split = (first, second) if second else (None, first)
        load("datasets")
        from huggingface_hub import HfApi  # here: slow, and for this source alone

        from composer_prior.data.hub import why_not

        try:
            info = HfApi().dataset_info(str(name), revision=revision)
            splits = _streamed(info.id, info.sha, subset)
            chosen = options.split or split or (next(iter(splits)) if len(splits) == 1 else None)
            if chosen not in splits:
                raise SourceError(f"{url}: choose one of its splits ({', '.join(splits)}): {url}/{next(iter(splits))}.")
            data = splits[chosen]
            columns = next(iter(data.with_format("arrow").iter(1))).column_names
        except SourceError:
            raise
        except Exception as error:  # of the libraries of HTTP and of all formats
            raise SourceError(f"{url} cannot be read: {why_not(error)}. Expected {_HUB_FORM}.") from error
        nowhere = Path(os.devnull)
        licence = info.card_data.get("license") if info.card_data else None
        whole = "/".join(filter(None, (f"hf://datasets/{info.id}@{info.sha}", subset, chosen)))
        origin = {"source": whole, **({"license": str(licence)} if licence else {})}
        place: dict[str, Any] = {"name": info.id, "revision": info.sha, "subset": subset, "split": chosen}
        fields = _columns(columns, options, url, nowhere)
        return cls(**place, shards=data.num_shards, folder=nowhere, origin=origin, **fields)

    def units(self) -> Iterator[str]:
        parts = [self.revision, self.subset, self.split]
        return ("/".join(filter(None, [*parts, str(number)])) for number in range(self.shards))

    def read(self, unit: str) -> Iterator[Record | Rejected]:
        arrow, seen, number = load("pyarrow"), Seen(), 0
        data = _streamed(self.name, self.revision, self.subset)[self.split]
        rows = data.shard(self.shards, int(unit.rpartition("/")[2])).select_columns(self.columns).with_format("arrow")
        keyed = self.options.key_column
        try:
            for table in rows.iter(_ROWS_AT_ONCE):
                for entry in (entry for batch in table.to_batches() for entry in _entries(batch)):
                    where = f"{unit}:{number}"
                    record = self.record(entry, where, where, bool(keyed) and not seen.add(entry.get(str(keyed))))
                    yield self._with_images(record) if isinstance(record, Record) else record
                    number += 1
        except Exception as error:  # of the libraries of HTTP and of all formats
            damaged = (arrow.ArrowException, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile)
            if not isinstance(error, damaged) and type(error) is not OSError:
                from composer_prior.data.hub import why_not  # here: as above

                why = f"{why_not(error)}; run the same command again to go on"
                raise SourceError(f"{self.origin['source']} cannot be read: {why}.") from error
            yield BadFile.of(unit, one_line(error, 200))

    def _with_images(self, record: Record) -> Record:
        """Return a record with the images that are files of the data set's own repository."""
        return replace(record, image=self._content(record.image), images=tuple(map(self._content, record.images)))

    def _content(self, image: bytes | str) -> bytes | str:
        own = _HUB_FILE.format(re.escape(self.name))  # a path could else lead to local files and other repositories
        if isinstance(image, bytes) or ".." in image.split("/") or not re.fullmatch(own, image):
            return image
        try:
            with load("fsspec").open(image, "rb") as file:
                return file.read(self.options.max_image_bytes + 1)
        except FileNotFoundError:
            return image


@cache  # in each process
def _streamed(name: str, revision: str, subset: str | None) -> Any:
    """Return the splits of a data set of the Hub by their names, without executing code in it."""
    return load("datasets").load_dataset(name, subset, revision=revision, streaming=True)


def _load_saved(path: Path, split: str | None) -> Any:
    """Load the chosen split of a saved dataset, without executing code in it."""
    datasets = load("datasets")
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        units = (file_unit(path, file, _arrow_problem) for file in sorted(path.rglob("*.arrow")))
        bad = [unit for unit in units if isinstance(unit, BadFile)]
        reason = describe(bad) if bad else one_line(error, 200)
        raise SourceError(f"{path}: not a readable Hugging Face dataset ({reason}).") from error
    if not isinstance(data, datasets.DatasetDict):
        return data
    name = split or (next(iter(data)) if len(data) == 1 else None)
    if name not in data:
        raise SourceError(f"{path}: choose one of its splits ({', '.join(data)}) with split=.")
    return data[name]


def _arrow_problem(path: Path) -> str | None:
    head, size = beginning(path)
    return kind_of(head) if size else "empty"


def _rows(opened: Any, groups: Iterable[int]) -> int:
    return sum(opened.metadata.row_group(group).num_rows for group in groups)


def _repeated(batches: Iterable[Any], seen: Seen) -> tuple[int, ...]:
    """Return the rows whose key is repeated, from batches of the column of keys alone."""
    keys = (key for batch in batches for row in _entries(batch) for key in row.values())
    return tuple(number for number, key in enumerate(keys) if not seen.add(key))


def _batches(opened: Any, groups: Iterable[int], columns: list[str]) -> Iterator[Any]:
    """Yield batches of some columns, with fewer rows if these unpack to much more than is stored.

    A row group that unpacks to more than 200 times its size raises OSError.
    """
    for number in groups:
        group = opened.metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{c}.") for c in columns)]
        packed = sum(chunk.total_compressed_size for chunk in chunks)
        unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
        if unpacked > max(_UNPACKED, 200 * packed):
            raise OSError(f"row group {number} of {packed} bytes unpacks to {unpacked}, more than 200 times as many")
        rows = _ROWS_AT_ONCE if unpacked < 4 * packed else max(1, min(_ROWS_AT_ONCE, 4 * _UNPACKED // max(1, unpacked)))
        yield from opened.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False)


def _entries(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow batch; invalid UTF-8 becomes surrogates, and a time out of Python's range a number."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        arrow = load("pyarrow")
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            yield {name: _scalar(arrow, column[0]) for name, column in zip(row.schema.names, row.columns, strict=True)}


def _scalar(arrow: Any, value: Any) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        if arrow.types.is_struct(value.type):
            return {name: _scalar(arrow, value[name]) for name in value}
        if arrow.types.is_list(value.type) or arrow.types.is_large_list(value.type):
            return [_scalar(arrow, item) for item in value.values]
        if not hasattr(value, "as_buffer"):
            return getattr(value, "value", None)
        return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
