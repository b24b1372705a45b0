"""Costs that grow with the data: ``python -m benchmarks.scale [largest=6] [shards=5] [out=scale.json]``.

The command prints three tables. The first writes, opens, orders and reads data sets of 10^3 … 10^``largest`` samples
with tiny images. The second opens and orders an index without shards, of 10^2 … 10^``shards`` shards with 1,000 samples
each. Each line is measured in a new process. The second table gives the costs of one shard and of one sample, and thus
those of a billion. The third counts the downloads of a shard in an epoch for caches of several sizes that evict the
least recently read shard, under streaming's order.
"""

import json
import resource
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from streaming.base.batching import generate_work

from composer_prior.data.mds import ShardWriter
from composer_prior.data.streams import CheckedDataset

DEFAULTS = {"largest": 6, "shards": 5, "image_bytes": 200, "caption_tokens": 40, "out": None}
COLUMNS = {"image": "bytes", "caption": "str"}
SAMPLES_PER_SHARD = 1000
MOST_IN_ORDER = 10_000_000
BILLION = 1_000_000_000


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    """Run a job, and return its seconds and its result."""
    start = time.perf_counter()
    result = job()
    return time.perf_counter() - start, result


def peak_mb() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def order(data: CheckedDataset) -> Any:
    """Compute the order of an epoch, as streaming does once for each node."""
    world = data._parallel_rank_world
    data._resume(world, 0)
    return generate_work(data.batching_method, data, world, 0, 0)


def open_data(folder: Path) -> CheckedDataset:
    """Open a shuffled data set."""
    return CheckedDataset(local=str(folder), batch_size=64, shuffle=True)


def written(samples: int, image_bytes: int) -> dict[str, float]:
    """Write, open, order and read a data set."""
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "shard", COLUMNS, SAMPLES_PER_SHARD * (image_bytes + 40))
        random = np.random.default_rng(0)
        images = [random.bytes(image_bytes) for _ in range(64)]

        def write() -> None:
            for index in range(samples):
                writer.write({"image": images[index % 64], "caption": f"photograph number {index}"})
            writer.finish()
            Path(folder, "index.json").write_text(json.dumps({"version": 2, "shards": writer.shards}))

        writing, _ = timed(write)
        opening, data = timed(lambda: open_data(Path(folder)))
        ordering, _ = timed(lambda: order(data))
        reading, count = timed(lambda: sum(1 for _ in data))
        assert count == samples
        return {
            "samples": samples,
            "shards": len(writer.shards),
            "index_kB": Path(folder, "index.json").stat().st_size / 1e3,
            "written_per_s": samples / writing,
            "open_s": opening,
            "order_s": ordering,
            "read_per_s": samples / reading,
        }


def write_index(folder: Path, shards: int) -> Path:
    """Write an index of missing shards."""
    writer = ShardWriter(folder, "shard", COLUMNS, 1 << 26)
    writer.write({"image": b"", "caption": ""})
    writer.finish()
    entry = {**writer.shards[0], "samples": SAMPLES_PER_SHARD}
    names = (f"shard.{number // 1000:06}.{number % 1000:03}.mds" for number in range(shards))
    entries = [{**entry, "raw_data": {**entry["raw_data"], "basename": name}} for name in names]
    index = folder / "index.json"
    index.write_text(json.dumps({"version": 2, "shards": entries}))
    return index


def simulated(shards: int) -> dict[str, float]:
    """Open and order a data set that has only an index."""
    with tempfile.TemporaryDirectory() as folder:
        index = write_index(Path(folder), shards)
        before = peak_mb()
        opening, data = timed(lambda: open_data(Path(folder)))
        after_open = peak_mb()
        samples = shards * SAMPLES_PER_SHARD
        in_order = samples <= MOST_IN_ORDER
        ordering = timed(lambda: order(data))[0] if in_order else float("nan")
        return {
            "shards": shards,
            "samples": samples,
            "index_kB": index.stat().st_size / 1e3,
            "open_s": opening,
            "open_MB": after_open - before,
            "order_s": ordering,
            "order_MB": peak_mb() - after_open if in_order else float("nan"),
        }


def downloads(samples: int, block: int) -> list[dict[str, float]]:
    """Count the downloads of each shard in an epoch, by the size of the cache in blocks of the shuffle."""
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), samples // SAMPLES_PER_SHARD)
        data = CheckedDataset(local=folder, batch_size=64, shuffle=True, shuffle_block_size=block)
        shards = order(data).flatten() // SAMPLES_PER_SHARD
    shards = shards[shards >= 0]
    rows = []
    for blocks in (0.25, 0.5, 1.0, 1.5, 2.0):
        size, cache, misses = round(blocks * block / SAMPLES_PER_SHARD), OrderedDict[int, None](), 0
        for shard in shards.tolist():
            if shard in cache:
                cache.move_to_end(shard)
                continue
            misses += 1
            if len(cache) >= size:
                cache.popitem(last=False)
            cache[shard] = None
        rows.append(
            {"cache_in_blocks": blocks, "cache_in_shards": size, "downloads_per_shard": misses / len(np.unique(shards))}
        )
    return rows


def alone(job: Callable[..., Any], *arguments: Any) -> Any:
    """Run a job in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(job, arguments)


def table(rows: list[dict[str, float]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| " + " | ".join(rows[0]) + " |"
    yield "| " + " | ".join("---:" for _ in rows[0]) + " |"
    for row in rows:
        yield "| " + " | ".join(shown(value) for value in row.values()) + " |"


def shown(value: float) -> str:
    """Format a number with three significant digits."""
    if value != value:
        return "not measured"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def costs(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the costs of one shard and of one sample, from the largest lines, where constants matter least."""
    opened, ordered = rows[-1], [row for row in rows if row["order_s"] == row["order_s"]][-1]
    return {
        "index_B_per_shard": 1e3 * opened["index_kB"] / opened["shards"],
        "open_us_per_shard": 1e6 * opened["open_s"] / opened["shards"],
        "open_B_per_shard": 1e6 * opened["open_MB"] / opened["shards"],
        "order_ns_per_sample": 1e9 * ordered["order_s"] / ordered["samples"],
        "order_B_per_sample": 1e6 * ordered["order_MB"] / ordered["samples"],
    }


def billion(cost: dict[str, float], caption_tokens: int) -> list[dict[str, float]]:
    """Return the costs of a billion samples of 100 kB, by the size of the shards."""
    rows = []
    for shard_mb in (64, 256, 1024):
        shards = BILLION * 100e3 / (shard_mb * 2**20)
        rows.append(
            {
                "shard_MiB": shard_mb,
                "shards": shards,
                "index_MB": shards * cost["index_B_per_shard"] / 1e6,
                "open_s": shards * cost["open_us_per_shard"] / 1e6,
                "open_GB_per_rank": shards * cost["open_B_per_shard"] / 1e9,
                "order_s": BILLION * cost["order_ns_per_sample"] / 1e9,
                "order_GB_per_node": BILLION * cost["order_B_per_sample"] / 1e9,
                "scores_GB": BILLION * (2 * caption_tokens + 8) / 1e9,
            }
        )
    return rows


def main(arguments: list[str]) -> None:
    """Measure, and print the tables."""
    given = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(arguments))
    real = [alone(written, 10**power, given.image_bytes) for power in range(3, given.largest + 1)]
    index_only = [alone(simulated, 10**power) for power in range(2, given.shards + 1)]
    cost = costs(index_only)
    report = {
        "written": real,
        "simulated": index_only,
        "costs": [cost],
        "billion": billion(cost, given.caption_tokens),
        "downloads": alone(downloads, 4_000_000, 1 << 18),
    }
    for name, rows in report.items():
        print(f"\n{name}\n")
        print("\n".join(table(rows)))
    if given.out:
        Path(given.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
