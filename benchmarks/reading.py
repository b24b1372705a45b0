"""Compare reading and decoding with plain PyTorch: ``python -m benchmarks.reading [images=2048] [workers=2] …``.

Two loaders take turns on the same synthetic photographs of about 100 kB: ours, from MDS shards, and a plain PyTorch
``Dataset`` with Pillow, from one file for each image. Both shuffle, decode, tokenize the caption, resize to the same
size and collate to the same batches, with the same number of workers; only the source of the bytes differs. Workers
start before the clock, and a warm page cache serves all reads. The output has the processor time of the program and its
workers beside the speed, as other programs on the machine affect it less.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.conversion import make_source
from composer_prior.conversion.convert import convert_captions
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator
from composer_prior.data.captions import StreamingCaptionDataset, caption_data_spec
from composer_prior.data.tokenizer import train_tokenizer
from composer_prior.models.prior_lvlm import PriorLVLMImageProcessor
from composer_prior.models.vision import image_inputs

DEFAULTS = {"images": 2048, "rounds": 15, "workers": 2, "batch": 64, "side": 224, "folder": None, "out": None}


class PlainDataset(Dataset[Mapping[str, Any]]):
    """A plain PyTorch data set: a list of files and captions, Pillow, and the same items."""

    def __init__(self, source: Path, data: StreamingCaptionDataset):
        lines = (source / "captions.jsonl").read_text().splitlines()
        self.pairs = [(str(source / line["image"]), line["caption"]) for line in map(json.loads, lines)]
        self.tokenizer, self.prepare = data.tokenizer, data.image_processor
        self.bos, self.places, self.longest = data.bos_id, data.placeholder_ids, data.max_caption_tokens

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        path, caption = self.pairs[index]
        assert self.prepare is not None
        with Image.open(path) as file:
            image = self.prepare(file.convert("RGB"))
        ids = self.tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id][: self.longest]
        prefix = [self.bos, *(self.places[kind] for kind in image.layout)]
        return {
            "input_ids": torch.tensor(prefix + ids),
            "labels": torch.tensor([IGNORE_INDEX] * len(prefix) + ids),
            **image.tensors,
            "sample_id": index,
        }


def processor_seconds() -> float:
    """Return the processor time so far of this process and its workers."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children(recursive=True)))


def epochs(loader: Any) -> Iterator[tuple[float, float, int]]:
    """Yield seconds, processor seconds and samples of each epoch; the first epoch starts the workers."""
    while True:
        start, used = time.perf_counter(), processor_seconds()
        samples = sum(len(batch["sample_id"]) for batch in loader)
        yield time.perf_counter() - start, processor_seconds() - used, samples


def measure(given: Any, folder: Path) -> dict[str, Any]:
    """Measure images per second of both loaders in turn."""
    source = folder / "source"
    source.mkdir()
    size = make_source(source, given.images)
    convert_captions(source, folder / "data", progress=False)
    tokenizer = train_tokenizer((f"photograph number {index}" for index in range(given.images)), 400)
    patches = {"type": "patches", "patch_size": 16, "max_side": given.side}
    data = StreamingCaptionDataset(
        local=str(folder / "data"),
        tokenizer=tokenizer,
        image_processor=partial(image_inputs, PriorLVLMImageProcessor(patches)),
        batch_size=given.batch,
        shuffle=True,
    )
    options = {"num_workers": given.workers, "persistent_workers": given.workers > 0}
    ours = caption_data_spec(data, given.batch, **options).dataloader
    collator = CaptionCollator(tokenizer.pad_token_id)
    theirs = DataLoader(PlainDataset(source, data), given.batch, shuffle=True, collate_fn=collator, **options)
    runs = {"ours": epochs(ours), "plain": epochs(theirs)}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    efforts: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(given.rounds + 1):
        for name in sorted(runs, reverse=bool(turn % 2)):  # none always comes first
            seconds, used, samples = next(runs[name])
            assert samples == given.images
            if turn:  # the first epoch warms the page cache and starts the workers
                speeds[name].append(samples / seconds)
                efforts[name].append(1e3 * used / samples)
                print(
                    f"{name:6} {speeds[name][-1]:8.1f} images/s {efforts[name][-1]:8.3f} CPU ms/image", file=sys.stderr
                )
    speed, effort = ({name: statistics.median(v) for name, v in values.items()} for values in (speeds, efforts))
    return {
        "images": given.images,
        "bytes_per_image": size // given.images,
        "rounds": given.rounds,
        "workers": given.workers,
        "images_per_s": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(speed["ours"] / speed["plain"], 3),
        "ratio_of_each_round": [round(a / b, 3) for a, b in zip(*speeds.values(), strict=True)],
        "CPU_ms_per_image": {name: round(value, 3) for name, value in effort.items()},
        "CPU_ratio": round(effort["plain"] / effort["ours"], 3),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }


def main(arguments: list[str]) -> None:
    """Measure, and print the medians, the ratio and the machine as one JSON object."""
    given = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(arguments))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        text = json.dumps(measure(given, Path(folder)), indent=2)
    print(text)
    if given.out:
        Path(given.out).write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
