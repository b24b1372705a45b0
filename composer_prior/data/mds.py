"""The layout of MDS shards: a writer, the header, and a reader of one column.

    count (uint32), count + 1 offsets (uint32), the configuration as JSON, then the samples; each begins with the sizes
    (uint32) of its columns of variable size, and all columns follow in the order of their names.

The bytes are those of ``streaming.MDSWriter`` (a test compares them). This writer is faster: it copies a sample once,
into memory that is reused, where the library copies it three times into new memory (a conversion takes 2.1 times as
long with it, ``python -m benchmarks.libraries``), and a conversion process starts in one second instead of fifteen.
"""

import io
import json
import mmap
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from composer_prior.data.messages import DataError

_PIECE = 1 << 18  # bytes hashed and written at a time, so that they stay in the processor's cache


class ShardWriter:
    """Writes samples as MDS shards, each of at most ``size_limit`` bytes unless a single sample is larger.

    The files are named ``{prefix}.000.mds``, ``{prefix}.001.mds`` …, and ``columns`` are ``"bytes"``, ``"str"`` or
    ``"json"``. ``buffer`` is memory for the samples of a shard, faster if another writer has used it.
    """

    def __init__(
        self, folder: Path, prefix: str, columns: dict[str, str], size_limit: int, buffer: io.BytesIO | None = None
    ):
        self.folder = folder
        self.prefix = prefix
        self.columns = dict(sorted(columns.items()))
        self.config = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": ["xxh64"],
            "size_limit": size_limit,
            "column_names": list(self.columns),
            "column_encodings": list(self.columns.values()),
            "column_sizes": [None] * len(self.columns),
        }
        self.header = json.dumps(self.config, sort_keys=True).encode()
        self.size_limit = size_limit
        self.shards: list[dict[str, Any]] = []
        self._lengths = struct.Struct(f"<{len(self.columns)}I")
        self._samples = io.BytesIO() if buffer is None else buffer
        self._disk = ThreadPoolExecutor(1)
        self._syncing: list[Future[None]] = []
        self._clear()

    def write(self, sample: dict[str, Any]) -> None:
        """Add one sample, a value for each column, and write the shard before it if that is full."""
        cells = [_encode(encoding, sample[name]) for name, encoding in self.columns.items()]
        size = 4 * len(cells) + sum(map(len, cells))
        if self.sizes and self.bytes + size + 4 > self.size_limit:
            self._flush()
        self._samples.write(self._lengths.pack(*map(len, cells)))
        self._samples.writelines(cells)
        self.sizes.append(size)
        self.bytes += size + 4

    def finish(self) -> None:
        """Write the last shard; all shards are safely on the disk when this returns."""
        if self.sizes:
            self._flush()
        for syncing in self._syncing:
            syncing.result()
        self._disk.shutdown()

    def _flush(self) -> None:
        start = 4 + 4 * (len(self.sizes) + 1) + len(self.header)
        offsets = np.cumsum([start, *self.sizes])
        head = np.concatenate([[len(self.sizes)], offsets]).astype(np.uint32).tobytes() + self.header
        name = f"{self.prefix}.{len(self.shards):03}.mds"
        digest = xxhash.xxh64()
        file = open(self.folder / name, "wb")  # noqa: SIM115 - closed once it is on the disk
        with self._samples.getbuffer() as buffer:
            end = sum(self.sizes)
            parts: list[Any] = [buffer[begin : min(begin + _PIECE, end)] for begin in range(0, end, _PIECE)]
            for part in (head, *parts):
                digest.update(part)
                file.write(part)
        file.flush()
        # The disk works on this shard while the next one is made.
        self._syncing.append(self._disk.submit(_sync, file))
        raw = {"basename": name, "bytes": int(offsets[-1]), "hashes": {"xxh64": digest.hexdigest()}}
        self.shards.append({"samples": len(self.sizes), "raw_data": raw, "zip_data": None, **self.config})
        self._clear()

    def _clear(self) -> None:
        self._samples.seek(0)
        self.sizes: list[int] = []
        self.bytes = 4 + 4 + len(self.header)


def _encode(encoding: str, value: Any) -> bytes:
    if encoding == "bytes":
        return value
    return (value if encoding == "str" else json.dumps(value)).encode()


def _sync(file: BufferedWriter) -> None:
    with file:
        os.fsync(file.fileno())


def sample_extent(shard: bytes | mmap.mmap, index: int) -> tuple[int, int]:
    """Return the first byte of a sample in a shard, and the byte behind its last."""
    begin, end = np.frombuffer(shard, np.uint32, 2, 4 * (1 + index)).tolist()
    return begin, end


def count_samples(shard: bytes) -> int | None:
    """Return how many samples a shard has; None if it is not whole."""
    count = int(np.frombuffer(shard[:4], np.uint32)[0]) if len(shard) >= 8 else 0
    if not count or len(shard) < 4 * (count + 2):
        return None
    return count if sample_extent(shard, count - 1)[1] == len(shard) else None


def read_column(data: Any, column: str, samples: range, *others: str) -> list[Any]:
    """Read one column of consecutive samples of a :class:`.CheckedDataset`.

    If a shard lacks the column, the first of ``others`` that it has is read instead. No other column is read.
    """
    values: list[Any] = []
    while len(values) < len(samples):
        shard_id, first = data.spanner[samples[len(values)]]
        shard = data.shards[shard_id]
        found = next((name for name in (column, *others) if name in shard.column_names), None)
        if found is None:
            raise ValueError(
                f"The data set has no column {column!r}, it has {', '.join(shard.column_names)}; samples with several "
                "captions each cannot be scored."
            )
        count = min(shard.samples - first, len(samples) - len(values))
        with _shard_bytes(data, shard_id) as content:
            values += (_cell(content, shard, found, first + i) for i in range(count))
    return values


def _shard_bytes(data: Any, shard_id: int) -> mmap.mmap:
    """Map a shard's file, downloaded if need be; the cache may evict it, but not while it is open."""
    shard = data.shards[shard_id]
    file = Path(shard.dirname, shard.split or "", shard.raw_data.basename)
    for _ in range(7):
        data.prepare_shard(shard_id)
        with suppress(FileNotFoundError), open(file, "rb") as opened:
            size, expected = os.fstat(opened.fileno()).st_size, shard.raw_data.bytes
            if size != expected:
                raise DataError(f"{file} has {size:,} bytes instead of {expected:,}: it is damaged or incomplete.")
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            content.madvise(mmap.MADV_RANDOM)
            return content
    raise FileNotFoundError(f"{file} is missing from the data set.")


def _cell(content: mmap.mmap, shard: Any, column: str, index: int) -> Any:
    """Return one column of one sample, which begins with the sizes of its columns of variable size."""
    from streaming.base.format.mds.encodings import mds_decode  # here: conversion starts without streaming

    begin, _ = sample_extent(content, index)
    variable = sum(not size for size in shard.column_sizes)
    given = iter(np.frombuffer(content[begin : begin + 4 * variable], np.uint32).tolist())
    sizes = [size or next(given) for size in shard.column_sizes]
    position = shard.column_names.index(column)
    start = begin + 4 * variable + sum(sizes[:position])
    return mds_decode(shard.column_encodings[position], content[start : start + sizes[position]])
