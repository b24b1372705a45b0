"""Emoji scenes: real drawings on a coloured canvas with captions that imitate alt text from the web, or with questions.

Each caption has the spans of characters that the image determines, for separate metrics of image-related and other
tokens. ``(seed, split, i)`` determine sample ``i`` of a split.
"""

import io
import json
import multiprocessing
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from composer_prior.emoji_scenes.captions import Clutter, templates_of, write_caption
from composer_prior.emoji_scenes.drawings import check_drawings, versions
from composer_prior.emoji_scenes.questions import CATEGORIES, make_question
from composer_prior.emoji_scenes.scenes import CLASSES, SPLITS, Scene, draw_scene, sample_rng, sample_scene

COLUMNS = {"image": "bytes", "caption": "str", "image_related_spans": "json"}
QUESTION_COLUMNS = {"messages": "json", "images": "bytes"}
LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
README = f"""\
# Emoji scenes
Pictures of one to four OpenMoji drawings, with captions in the manner of web alt text, or with questions (`messages`).
`train/` and `validation/` are MDS data sets for mosaicml-streaming; `recipe.json` says how they were made.
`image_related_spans` lists the [start, end) characters of a caption that its image determines.
Drawings: OpenMoji (openmoji.org), {LICENCE} (https://creativecommons.org/licenses/by-sa/4.0/); so are the images.
"""

# Smallest and largest value of each argument.
_SAMPLES = (1, 10**8)
_BOUNDS = {"train_samples": _SAMPLES, "validation_samples": _SAMPLES, "canvas": (32, 4096), "seed": (0, sys.maxsize)}
_DEFAULTS: dict[str, Any] = {"clutter": "full", "questions": False}  # of arguments that recipe.json leaves out
_CHUNK = 128  # samples a worker makes at a time
_SMALLEST_JOB = 2000  # samples below which starting workers takes longer than it saves


def make_emoji_scenes(
    out: str | Path,
    *,
    train_samples: int = 20000,
    validation_samples: int = 1000,
    canvas: int = 96,
    seed: int = 17,
    clutter: Clutter = "full",
    questions: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write `out/train` and `out/validation` as MDS data sets, or return at once if they exist.

    `out` appears atomically. Validation scenes have combinations that are absent from training.

    Args:
        out: folder to create, with its parents.
        train_samples: scenes in `out/train`.
        validation_samples: scenes in `out/validation`.
        canvas: side of the square images in pixels, at least 32.
        seed: together with a split and an index it determines a sample.
        clutter: captions with names, dates and numbers, which neither image nor text predicts: ``"none"``, about half
            of them (``"some"``), or nearly all (``"full"``).
        questions: conversations instead of captions, see :func:`make_conversation`.
        num_workers: worker processes (0: this process); default one per core, up to 8. The data do not depend on it.
        progress: show a progress bar.

    Raises:
        ImportError: the packages of the `emoji` extra are missing.
        ValueError: an invalid argument, or `out` has other content.
    """
    out = Path(out).absolute()
    counts = dict(zip(SPLITS, (train_samples, validation_samples), strict=True))
    numbers = {f"{split}_samples": count for split, count in counts.items()} | {"canvas": canvas, "seed": seed}
    for key, value in numbers.items():
        least, most = _BOUNDS[key]
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise ValueError(f"{key} must be {bound}, got {value}")
    templates_of(clutter)  # or refuse it
    if questions and clutter != "full":
        raise ValueError(f"clutter={clutter!r} is about captions: leave it out beside questions=true.")
    named = {"clutter": clutter, "questions": questions}
    arguments = {**numbers, **{key: value for key, value in named.items() if value != _DEFAULTS[key]}}
    if _is_made(out, arguments):
        return
    check_drawings(CLASSES)
    with FileLock(out.with_name(f".{out.name}.making")) as lock:  # waits while another process makes them
        try:
            if _is_made(out, arguments):
                return
            unfinished = out.with_name(f".{out.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
            of_captions = partial(make_sample, canvas=canvas, seed=seed, clutter=clutter)
            make = partial(make_conversation, canvas=canvas, seed=seed) if questions else of_captions
            columns = QUESTION_COLUMNS if questions else COLUMNS
            _write_splits(unfinished, counts, make, columns, num_workers, progress)
            recipe = {"arguments": arguments, "packages": versions(), "licence": LICENCE, "attribution": ATTRIBUTION}
            (unfinished / "README.md").write_text(README)
            (unfinished / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
            unfinished.rename(out)
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)


def make_sample(
    split: str, index: int, *, canvas: int = 96, seed: int = 17, clutter: Clutter = "full"
) -> dict[str, Any]:
    """Make sample `index` of `split`, as it is written."""
    rng = sample_rng(split, index, seed)
    scene = sample_scene(split, rng, canvas=canvas, seed=seed)
    caption, spans = write_caption(scene, rng, clutter)
    return {"image": _png(scene), "caption": caption, "image_related_spans": spans}


def make_conversation(split: str, index: int, *, canvas: int = 96, seed: int = 17) -> dict[str, Any]:
    """Make conversation `index` of `split`: a question of :func:`.make_question` and its answer; topics take turns.

    Those of `validation` are the first that the benchmark asks; `train` has none of its scenes.
    """
    number, turn = divmod(index, len(CATEGORIES))
    item = make_question(CATEGORIES[turn], number, form="question", canvas=canvas, seed=seed, split=split)
    asked = [{"type": "image"}, {"type": "text", "text": item.prompt}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": item.texts[0]}]
    image = _png(item.scene)
    return {"messages": messages, "images": struct.pack("<2I", 1, len(image)) + image}  # number of images, and sizes


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    draw_scene(scene).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _is_made(out: Path, arguments: Mapping[str, Any]) -> bool:
    """Return True if `out` has the requested data; raise ValueError if it has other content."""
    if not out.exists():
        return False
    remedy = "delete it or name another folder"
    if not (out / "recipe.json").is_file():
        raise ValueError(f"{out} exists but holds no emoji scenes (no recipe.json): {remedy}")
    found = json.loads((out / "recipe.json").read_text()).get("arguments", {})
    found, asked = ({**_DEFAULTS, **values} for values in (found, arguments))
    differing = [f"{k}: {found.get(k)} there, {v} asked for" for k, v in asked.items() if found.get(k) != v]
    if differing:
        raise ValueError(f"{out} was made with other arguments ({'; '.join(differing)}): {remedy}, or ask for the same")
    return True


def _write_splits(
    folder: Path,
    counts: dict[str, int],
    make: Callable[..., Any],
    columns: dict[str, str],
    num_workers: int | None,
    progress: bool,
) -> None:
    from streaming import MDSWriter  # here, not above: it imports torch, which the workers do without

    total = sum(counts.values())
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), 8) if total >= _SMALLEST_JOB else 0
    # Workers are spawned: a fork would copy the locks of running threads. None is started before it has work.
    pool = ProcessPoolExecutor(max(1, num_workers), multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        with tqdm(total=total, desc="emoji scenes", unit=" samples", disable=not progress) as bar:
            for split, count in counts.items():
                one = partial(make, split)
                samples = pool.map(one, range(count), chunksize=_CHUNK) if num_workers else map(one, range(count))
                with MDSWriter(out=str(folder / split), columns=columns, hashes=["sha1"], size_limit=4 << 20) as writer:
                    for sample in samples:
                        writer.write(sample)
                        bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End a worker of a pool when its parent is killed."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
