"""Write scores by units of consecutive samples."""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from composer_prior.data.download import ATTEMPTS
from composer_prior.data.mds import ShardWriter, count_samples
from composer_prior.data.remote import Output
from composer_prior.data.scores import INDEX, METADATA, ScoresError, ScoresMetadata, encode_logprobs, read_index
from composer_prior.data.storage import is_remote, write_whole

_SHARD_BYTES = (1 << 32) - 1  # offsets are uint32


class ScoresWriter:
    """Writes scores by units of consecutive samples, in any order and from any process, to a folder or a remote.

    Args:
        out: folder, or remote such as ``s3://bucket/scores``.
        metadata: the data, tokenizer and reference of the scores.
        unit_samples: samples of a unit.
        worker: a different number for each process that writes.
    """

    def __init__(self, out: str, metadata: ScoresMetadata, unit_samples: int, worker: int = 0):
        self.metadata = metadata
        self.unit_samples = unit_samples
        self.columns = {metadata.column: "bytes"}
        out = os.path.expanduser(out)
        self._temporary = tempfile.TemporaryDirectory() if is_remote(out) else None
        self.work = Path(self._temporary.name) if self._temporary else Path(out, ".scoring", str(worker))
        self.work.mkdir(parents=True, exist_ok=True)
        self.out = Output(out, self.work, ATTEMPTS)

    @property
    def units(self) -> list[range]:
        """Return the samples of each unit."""
        starts = range(0, self.metadata.samples, self.unit_samples)
        return [range(start, min(start + self.unit_samples, self.metadata.samples)) for start in starts]

    def begin(self) -> dict[int, dict[str, Any]] | None:
        """Claim the output, and return the index entries of existing units, or None if all are complete.

        Raises:
            ScoresError: if the output holds other scores or other files.
        """
        names = self.out.names()
        known = self.out.read(METADATA, names)
        if known is not None:
            ScoresMetadata.from_json(known, self.out.label).check(self.metadata, self.out.label)
            with suppress(ScoresError):  # a damaged or wrong index is written again
                index = self.out.read(INDEX, names) or b""
                read_index(index, self.out.label, self.metadata.samples, self.metadata.column)
                return None
        elif set(names or ()) - {".scoring"} or self.out.read(INDEX, names) is not None:
            raise ScoresError(f"{self.out.label} holds other files than scores; name an empty folder.")
        else:
            self._put(METADATA, self.metadata.to_json())
        present = {name for name in names or () if re.fullmatch(r"shard\.\d+\.000\.mds", name)}
        wanted = ((unit, self._read_entry(unit, names)) for unit in range(len(self.units)) if _shard(unit) in present)
        return {unit: entry for unit, entry in wanted if entry is not None}

    def write(self, unit: int, logprobs: Sequence[NDArray[np.floating]]) -> dict[str, Any]:
        """Write one unit, whole or not at all, and return its index entry.

        Args:
            unit: number of the unit.
            logprobs: ``[tokens]`` for each of its samples; empty for a sample that cannot be used.
        """
        writer = ShardWriter(self.work, f"shard.{unit:05}", self.columns, _SHARD_BYTES)
        for values in logprobs:
            writer.write({self.metadata.column: encode_logprobs(values)})
        writer.finish()
        (entry,) = writer.shards
        self.out.publish(self.work, [_shard(unit)])
        return entry

    def finish(self, entries: Mapping[int, dict[str, Any]]) -> None:
        """Write the index, from the entries of all units."""
        shards = [entries[unit] for unit in range(len(self.units))]
        self._put(INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())

    def _read_entry(self, unit: int, names: set[str] | None) -> dict[str, Any] | None:
        """Return the index entry of an existing shard, or None if it is incomplete or of another size."""
        data = self.out.read(_shard(unit), names)
        config = ShardWriter(self.work, "", self.columns, _SHARD_BYTES).config
        samples = len(self.units[unit])
        if data is None or count_samples(data) != samples:
            return None
        raw = {"basename": _shard(unit), "bytes": len(data), "hashes": {"xxh64": xxhash.xxh64(data).hexdigest()}}
        return {"samples": samples, "raw_data": raw, "zip_data": None, **config}

    def _put(self, name: str, data: bytes) -> None:
        write_whole(self.work / name, data)
        self.out.publish(self.work, [name])


def _shard(unit: int) -> str:
    return f"shard.{unit:05}.000.mds"
