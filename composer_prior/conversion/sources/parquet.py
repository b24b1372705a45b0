"""Parquet files, and Arrow rows, which saved Hugging Face datasets share with them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from composer_prior.conversion.sources.base import (
    SPANS,
    BadFile,
    FileUnit,
    Record,
    Rejected,
    Seen,
    SourceError,
    SourceOptions,
    load,
    pick_columns,
)
from composer_prior.conversion.sources.files import describe, file_unit, parquet_problem
from composer_prior.conversion.sources.records import record_of
from composer_prior.data.messages import one_line

ROWS_AT_ONCE = 32
_UNPACKED = 64 << 20  # bytes of a row group's columns that are accepted without a check


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
    format: str = field(default="parquet", init=False)

    @property
    def folder(self) -> Path:
        return self.root.resolve()

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
            image, caption, images = pick_columns(names, options, file.name, root)
            return cls(root, tuple(files), options, image, caption, images, SPANS in names)
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
                    for unit in self._cut(whole, opened, seen):
                        yield unit
                        groups = range(unit.first, unit.last)
                        done = unit.row + sum(opened.metadata.row_group(group).num_rows for group in groups)
            except (arrow.ArrowException, OSError, LookupError) as error:
                yield BadFile.of(whole.name, one_line(error, 200), None if rows is None else rows - done)

    def _cut(self, whole: FileUnit, opened: Any, seen: Seen) -> Iterator[FileUnit]:
        first, row, rows = 0, 0, 0
        for group in range(opened.num_row_groups):
            rows += opened.metadata.row_group(group).num_rows
            if rows >= self.options.unit_samples or group == opened.num_row_groups - 1:
                yield replace(
                    whole, first=first, last=group + 1, row=row, repeated=self._repeated(opened, first, group + 1, seen)
                )
                first, row, rows = group + 1, row + rows, 0

    def _repeated(self, opened: Any, first: int, last: int, seen: Seen) -> tuple[int, ...]:
        """Return the rows whose key is repeated, from the column of keys alone."""
        if self.options.key_column is None:
            return ()
        if self.options.key_column not in opened.schema_arrow.names:
            raise LookupError(f"no column {self.options.key_column!r}")
        batches = _batches(opened, range(first, last), [self.options.key_column])
        keys = (key for batch in batches for row in batch_rows(batch) for key in row.values())
        return tuple(number for number, key in enumerate(keys) if not seen.add(key))

    def read(self, unit: FileUnit | BadFile) -> Iterator[Record | Rejected]:
        if isinstance(unit, BadFile):
            yield unit
            return
        parquet, arrow = load("pyarrow.parquet"), load("pyarrow")
        columns = [self.image, self.caption, *filter(None, [self.options.key_column]), *[SPANS] * self.has_spans]
        repeated, number, rows = set(unit.repeated), 0, 0
        try:
            with parquet.ParquetFile(self.root / unit.name, buffer_size=1 << 20) as file:
                rows = sum(file.metadata.row_group(group).num_rows for group in range(unit.first, unit.last))
                groups = range(unit.first, unit.last)
                for batch in _batches(file, groups, columns):
                    for entry in batch_rows(batch):
                        key, where = str(unit.row + number), f"{unit.name}:{unit.row + number}"
                        yield row_record(entry, self.image, self.caption, self.options, key, where, number in repeated)
                        number += 1
        except (arrow.ArrowException, OSError) as error:
            for lost in range(unit.row + number, unit.row + max(rows, number + 1)):
                yield Rejected(str(lost), "unreadable row", f"{unit.name}:{lost}", one_line(error, 200))


def _batches(opened: Any, groups: Iterable[int], columns: list[str]) -> Iterator[Any]:
    """Yield batches of some columns, with fewer rows if these unpack to much more than is stored.

    Raises:
        OSError: if a row group unpacks to more than 200 times its size.
    """
    for number in groups:
        group = opened.metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{c}.") for c in columns)]
        packed, unpacked = (
            sum(getattr(c, f"total_{kind}_size") for c in chunks) for kind in ("compressed", "uncompressed")
        )
        if unpacked > max(_UNPACKED, 200 * packed):
            raise OSError(f"row group {number} of {packed} bytes unpacks to {unpacked}, more than 200 times as many")
        rows = ROWS_AT_ONCE if unpacked < 4 * packed else max(1, min(ROWS_AT_ONCE, 4 * _UNPACKED // max(1, unpacked)))
        yield from opened.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False)


def batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
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


def row_record(
    entry: dict[str, Any], image: str, caption: str, options: SourceOptions, number: str, where: str, repeated: bool
) -> Record | Rejected:
    """Return the record of one row of a table that may hold image bytes."""
    given = entry.get(options.key_column) if options.key_column else None
    key = number if given is None else str(given)
    record = record_of(entry.get(image), entry.get(caption), entry.get(SPANS), key, where, has_spans=SPANS in entry)
    if repeated and isinstance(record, Record):
        return Rejected(key, "duplicate key", where, count=max(1, len(record.captions)))
    return record
