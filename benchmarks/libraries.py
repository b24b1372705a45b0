"""Compare our code with the library code that it replaces: ``python -m benchmarks.libraries [images=4096] [rounds=7]``.

The same job runs with both in turn: a conversion with our shard writer and with ``MDSWriter``, and reading from a
remote with our loops and with those of ``StreamingDataset``.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import OmegaConf
from streaming import MDSWriter, StreamingDataset

from benchmarks.conversion import make_source
from benchmarks.measure import in_process, interleaved, prepare_process, ratio
from benchmarks.reading import epochs
from composer_prior.conversion import units
from composer_prior.conversion.convert import convert_captions
from composer_prior.data.captions import StreamingCaptionDataset, caption_data_spec
from composer_prior.data.tokenizer import train_tokenizer

DEFAULTS = {"images": 4096, "rounds": 7, "threads": os.cpu_count(), "folder": None}


class LibraryWriter:
    """``MDSWriter`` behind the interface of our writer."""

    def __init__(self, folder: Path, prefix: str, columns: dict[str, str], size_limit: int, buffer: Any = None):
        self.folder, self.prefix = folder, prefix
        self.out = folder / prefix
        self.writer = MDSWriter(out=str(self.out), columns=columns, hashes=["xxh64"], size_limit=size_limit)
        self.write = self.writer.write

    def finish(self) -> None:
        """Move the shards into one folder, as our writer does."""
        self.writer.finish()
        self.shards = json.loads((self.out / "index.json").read_bytes())["shards"]
        for number, shard in enumerate(self.shards):
            name = f"{self.prefix}.{number:03}.mds"
            file = self.out / shard["raw_data"]["basename"]
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            shard["raw_data"]["basename"] = name
            os.replace(file, self.folder / name)
        (self.out / "index.json").unlink()
        self.out.rmdir()


class LibraryReady(StreamingCaptionDataset):
    """Streaming's thread that polls for ready samples, and the loop that waits for it."""

    _ready_thread = StreamingDataset._ready_thread
    _each_sample_id = StreamingDataset._each_sample_id


class LibraryLocks(StreamingCaptionDataset):
    """Streaming's lock for every sample."""

    def _is_there(self, shard_id: int) -> bool:
        return False


class LibraryBarrier(StreamingCaptionDataset):
    """Streaming's barrier, which polls 20 times a second."""

    __iter__ = StreamingDataset.__iter__


def writing(given: Any, folder: Path) -> None:
    """Measure conversion with either writer."""
    source = folder / "source"
    source.mkdir()
    make_source(source, given.images)
    count = iter(range(1 << 30))

    def convert() -> None:
        convert_captions(source, folder / f"out{next(count)}", progress=False)
        os.sync()

    def by_library() -> None:
        with patch.object(units, "ShardWriter", LibraryWriter):
            convert()

    report("conversion", interleaved({"ours": convert, "MDSWriter": by_library}, given.rounds))


def reading(given: Any, folder: Path, workers: int) -> None:
    """Measure reading captions from a remote; all shards are in the cache after the first epoch."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer((f"photograph number {index}" for index in range(given.images)), 400)
    loaders: dict[str, Iterator[Any]] = {}
    for kind in (StreamingCaptionDataset, LibraryReady, LibraryLocks, LibraryBarrier):
        cache = str(folder / f"{kind.__name__}{workers}")
        data = kind(remote=str(folder / "out0"), local=cache, tokenizer=tokenizer, batch_size=64, shuffle=True)
        options = {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "fork"}
        loaders[kind.__name__] = epochs(caption_data_spec(data, 64, **options).dataloader)

    def epoch(name: str) -> Callable[[], Any]:
        return lambda: next(loaders[name])

    report(f"reading, {workers} workers", interleaved({name: epoch(name) for name in loaders}, given.rounds))


def report(what: str, seconds: Mapping[str, list[float]]) -> None:
    """Print one line for each alternative: its time as a multiple of ours."""
    (_, ours), *others = seconds.items()
    for name, taken in others:
        rounds = " ".join(f"{b / a:.2f}" for a, b in zip(ours, taken, strict=True))
        print(f"| {what} | {name} | {median(ours):.3f} s | {ratio(taken, ours):.3f} x | {rounds} |", flush=True)


def main(arguments: list[str]) -> None:
    """Print a Markdown table."""
    given = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(arguments))
    prepare_process(given.threads)
    print("| what | instead of ours | ours | it takes | in each round |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        writing(given, Path(folder))
        for workers in (2, 8):
            in_process(reading, given, Path(folder), workers)


if __name__ == "__main__":
    main(sys.argv[1:])
