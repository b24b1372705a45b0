"""Compare captioning with a plain loop of transformers: ``python -m benchmarks.captioning MODEL IMAGES [rounds=5] …``.

``composer-prior caption`` takes turns with the processor and ``generate`` of the same model folder, one image at a time
and in batches; the loop reads each image when it needs it. MODEL is a run folder, IMAGES a folder of images.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.measure import prepare_process, ratio
from composer_prior.inference.caption import Images, caption_loaded, find_images
from composer_prior.inference.loading import load

DEFAULTS = {"rounds": 5, "images": 256, "max_new_tokens": 64, "threads": os.cpu_count(), "num_workers": None}


def hugging_face(folder: str, names: list[str], batch_size: int, longest: int) -> Callable[[], list[str]]:
    """Return a plain captioning loop with transformers."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def run() -> list[str]:
        captions: list[str] = []
        for start in range(0, len(names), batch_size):
            images = [Image.open(name).convert("RGB") for name in names[start : start + batch_size]]
            inputs = processor(images=images, padding=True, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            captions += processor.batch_decode(ids, skip_special_tokens=True)
        return captions

    return run


def ours(folder: str, names: list[str], batch_size: int, given: Any) -> Callable[[], list[str]]:
    """Return the loop of ``composer-prior caption`` on a loaded model."""
    model = load(folder)

    def run() -> list[str]:
        images = Images(names, set())
        options = {"max_new_tokens": given.max_new_tokens}
        found = caption_loaded(model, images, batch_size, given.num_workers, None, options)
        captions = {image.name: caption.text for batch in found for image, caption in batch if caption is not None}
        return [captions[name] for name in names]  # each worker makes batches of its own share

    return run


def main(arguments: list[str]) -> None:
    """Print a Markdown table."""
    run, source, *rest = arguments
    given = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(rest))
    prepare_process(given.threads)
    folder = str(Path(run, "model"))
    names = [*find_images([source])][: given.images]
    print("| batch | Hugging Face, images/s | ours, images/s | ours / Hugging Face |\n| --- | --- | --- | --- |")
    for batch_size in (1, 16):
        jobs = {
            "theirs": hugging_face(folder, names, batch_size, given.max_new_tokens),
            "ours": ours(folder, names, batch_size, given),
        }
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        captions = {}
        for turn in range(given.rounds + 1):
            for name in sorted(jobs, reverse=bool(turn % 2)):
                start = time.perf_counter()
                captions[name] = jobs[name]()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        assert captions["theirs"] == captions["ours"]
        theirs, own = (len(names) / statistics.median(seconds[name]) for name in ("theirs", "ours"))
        print(
            f"| {batch_size} | {theirs:.1f} | {own:.1f} | {ratio(seconds['theirs'], seconds['ours']):.3f} |", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
