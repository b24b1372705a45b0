"""Compare conversion with copying: ``python -m benchmarks.conversion [images=8192] [rounds=7] [processes=2] …``.

Four things take turns on the same synthetic photographs of about 100 kB, on the same disk: a conversion with the
default check, one with ``check=full``, a copy of the files with a checksum of each, and the same copy into files of
64 MiB, which avoids many small files. All use the same number of processes and the same checksum; the time includes
syncing to the disk. A warm page cache serves all reads. No file is deleted before the end (ext4 creates files several
times slower after deletions), so the disk has to hold the images 4 * rounds + 1 times.
"""

import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import xxhash
from omegaconf import OmegaConf
from PIL import Image

from composer_prior.conversion.convert import convert_captions

DEFAULTS = {"images": 8192, "rounds": 7, "processes": 2, "folder": None, "out": None}


def photograph(seed: int, size: tuple[int, int] = (512, 384)) -> bytes:
    """Return a JPEG of about 100 kB with smooth shapes and grain."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = random.normal(0, 14, (size[1], size[0], 1))
    buffer = io.BytesIO()
    image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_source(folder: Path, images: int) -> int:
    """Write a folder of photographs with captions.jsonl, and return the total size of its images in bytes."""
    distinct = [photograph(seed) for seed in range(min(images, 256))]
    with open(folder / "captions.jsonl", "w") as lines:
        for index in range(images):
            (folder / f"{index:06}.jpg").write_bytes(distinct[index % len(distinct)])
            lines.write(json.dumps({"image": f"{index:06}.jpg", "caption": f"photograph number {index}"}) + "\n")
    return sum(len(distinct[index % len(distinct)]) for index in range(images))


def copy_files(names: list[str], source: Path, out: Path) -> None:
    """Copy files one by one, with a checksum of each."""
    with open(out / f"{os.getpid()}.sums", "w") as sums:
        for name in names:
            data = (source / name).read_bytes()
            sums.write(f"{xxhash.xxh64(data).hexdigest()}  {name}\n")
            (out / name).write_bytes(data)


def copy_joined(names: list[str], source: Path, out: Path, limit: int = 64 << 20) -> None:
    """Copy the bytes of files into few large ones, with a checksum of each."""
    number = 0
    while names:
        digest, size = xxhash.xxh64(), 0
        with open(out / f"{os.getpid()}.{number}", "wb") as file:
            while names and size < limit:
                data = (source / names[0]).read_bytes()
                names, size = names[1:], size + len(data)
                digest.update(data)
                file.write(data)
        (out / f"{os.getpid()}.{number}.sum").write_text(digest.hexdigest())
        number += 1


def in_parallel(job: Callable[[list[str], Path, Path], None], source: Path, out: Path, processes: int) -> None:
    """Run a copy job in several processes, each on a contiguous slice of the files."""
    names = sorted(path.name for path in source.glob("*.jpg"))
    out.mkdir()
    cuts = [len(names) * index // processes for index in range(processes + 1)]
    workers = [
        get_context("fork").Process(target=job, args=(names[start:stop], source, out)) for start, stop in pairwise(cuts)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(arguments: list[str]) -> None:
    """Measure, and print the medians, the ratios and the machine as one JSON object."""
    given = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(arguments))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source = Path(folder) / "source"
        source.mkdir()
        size = make_source(source, given.images)
        options = {"processes": given.processes, "progress": False}
        jobs: dict[str, Callable[[Path], object]] = {
            "convert": lambda out: convert_captions(source, out, **options),
            "convert, check=full": lambda out: convert_captions(source, out, check="full", **options),
            "copy with checksums": lambda out: in_parallel(copy_files, source, out, given.processes),
            "copy into 64 MiB files": lambda out: in_parallel(copy_joined, source, out, given.processes),
        }
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(given.rounds):
            for name, job in jobs.items():
                out = Path(folder) / f"{turn} {name}"
                os.sync()
                start = time.perf_counter()
                job(out)
                os.sync()
                seconds[name].append(time.perf_counter() - start)
                print(f"{name:24} {size / seconds[name][-1] / 1e6:8.1f} MB/s", file=sys.stderr)
    speeds = {name: size / statistics.median(taken) / 1e6 for name, taken in seconds.items()}
    report = {
        "images": given.images,
        "bytes_per_image": size // given.images,
        "rounds": given.rounds,
        "processes": given.processes,
        "MB_per_s": {name: round(speed, 1) for name, speed in speeds.items()},
        **{
            f"of_{copy}": {name: round(speed / speeds[copy], 3) for name, speed in speeds.items()}
            for copy in ("copy with checksums", "copy into 64 MiB files")
        },
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if given.out:
        Path(given.out).write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
