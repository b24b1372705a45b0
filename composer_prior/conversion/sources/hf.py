"""A Hugging Face dataset saved with ``save_to_disk``."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_prior.conversion.sources.base import (
    SPANS,
    BadFile,
    Record,
    Rejected,
    Seen,
    SourceError,
    SourceOptions,
    load,
    pick_columns,
)
from composer_prior.conversion.sources.files import beginning, describe, file_unit, kind_of
from composer_prior.conversion.sources.parquet import ROWS_AT_ONCE, batch_rows, row_record
from composer_prior.data.messages import one_line


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
    format: str = field(default="hf", init=False)

    @classmethod
    def open(cls, path: Path, options: SourceOptions) -> "HFSource":
        data = _load_saved(path, options.split)
        image, caption, images = pick_columns(data.column_names, options, str(path), path)
        return cls(path, options, image, caption, images, len(data), SPANS in data.column_names)

    @property
    def folder(self) -> Path:
        return self.path.resolve()

    def bad_files(self) -> Iterator[BadFile]:
        return iter(())  # a damaged dataset cannot be opened

    def units(self) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
        data, seen = _load_saved(self.path, self.options.split), Seen()
        for start in range(0, len(data), self.options.unit_samples):
            stop = min(start + self.options.unit_samples, len(data))
            names = [self.options.key_column] if self.options.key_column else []
            batches = data.with_format("arrow").select_columns(names)[start:stop].to_batches() if names else ()
            keys = (key for batch in batches for row in batch_rows(batch) for key in row.values())
            repeated = [n for n, key in enumerate(keys) if not seen.add(key)]
            yield data._fingerprint, start, stop, tuple(repeated)

    def read(self, unit: tuple[str, int, int, tuple[int, ...]]) -> Iterator[Record | Rejected]:
        _, start, stop, again = unit
        repeated = set(again)
        data = _load_saved(self.path, self.options.split).with_format("arrow")
        names = [self.image, self.caption, *filter(None, [self.options.key_column]), *[SPANS] * self.has_spans]
        data, number = data.select_columns(list(dict.fromkeys(names))), start
        for begin in range(start, stop, ROWS_AT_ONCE):
            for batch in data[begin : min(begin + ROWS_AT_ONCE, stop)].to_batches():
                for entry in batch_rows(batch):
                    where = f"row {number}"
                    is_repeated = number - start in repeated
                    yield row_record(entry, self.image, self.caption, self.options, str(number), where, is_repeated)
                    number += 1


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
