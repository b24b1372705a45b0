"""Captions of images, from the command line: any number of them, in order, as soon as each is known."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from composer_prior.data.files import begin_lines
from composer_prior.data.images import decode_rgb, read_image_file
from composer_prior.data.locks import sole_writer
from composer_prior.data.messages import one_line
from composer_prior.data.remote import Remote
from composer_prior.data.storage import is_remote
from composer_prior.inference.loading import check_device, load
from composer_prior.models.image_text_model import Caption, ImageTextModel, model_inputs
from composer_prior.reports.page import legend, sample_card, samples_page

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PAGE_IMAGES = 200


class Decoded(NamedTuple):
    """An image as a worker hands it over."""

    name: str
    image: Image.Image | None  # RGB; None if it cannot be used, or is prepared
    error: str = ""  # why it cannot be used


class Images(IterableDataset[Decoded]):
    """The images of :func:`find_images` that are not done, read and decoded in the order in which they are found."""

    def __init__(self, sources: Sequence[str], done: set[str]):
        self.sources = sources
        self.done = done

    def __iter__(self) -> Iterator[Decoded]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        names = (name for name in find_images(self.sources) if name not in self.done)
        yield from map(self._decode, islice(names, first, None, step))

    def _decode(self, name: str) -> Decoded:
        try:
            return Decoded(name, decode_rgb(read_bytes(name)))
        except Exception as error:  # one image's trouble, whatever it is
            return Decoded(name, None, one_line(error))


def find_images(sources: Sequence[str]) -> Iterator[str]:
    """Yield the names of images; in remotes, folders and their subfolders those with the suffix of an image."""
    for source in sources:
        if is_remote(source) and not source.lower().endswith(SUFFIXES):
            remote = Remote(source)
            yield from (f"{remote.url}/{name}" for name in remote.names() if name.lower().endswith(SUFFIXES))
        elif os.path.isdir(source):
            for folder, folders, files in os.walk(source):
                folders.sort()
                yield from (os.path.join(folder, name) for name in sorted(files) if name.lower().endswith(SUFFIXES))
        else:
            yield source


def read_bytes(name: str) -> bytes:
    """Read a file, or an object of a remote."""
    if not is_remote(name):
        return read_image_file(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image")
        url, _, image = name.rpartition("/")
        Remote(url).get(image, file, attempts=3)
        return read_image_file(file)


def caption_images(
    model: str,
    sources: Sequence[str],
    *,
    out: str = "captions.jsonl",
    page: str | None = None,
    batch_size: int = 16,
    prompt: str | None = None,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    temperature: float = 0.0,
    seed: int = 17,
    num_workers: int | None = None,
    device: str | None = None,
    progress: bool | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Caption images, one line of JSON each: ``{"image", "caption"}``, or ``{"image", "error"}`` for an unreadable one.

    With a page lines also have ``tokens``, the pieces of the caption with their probabilities. Lines are written as
    soon as they are ready. The same call resumes an interrupted one; with other options it is rejected.

    Args:
        model: a run folder, a model folder, a checkpoint or a hub id.
        sources: images, folders of images, and addresses of either in a remote.
        out: the file that the lines go to. Default: ``captions.jsonl``.
        page: a page of HTML with the first 200 images of ``out``, each token of a caption shaded by its probability.
        batch_size: images that are captioned at once.
        prompt: text between image and caption. Default: that of training.
        max_new_tokens: longest caption in tokens.
        num_beams: captions that a beam search follows at once; 1 is greedy.
        temperature: of sampling; 0 takes the most likely token.
        seed: of sampling.
        num_workers: processes that read and decode images. Default: the cores that the model leaves free, at most 8.
        device: such as ``cuda:1``. Default: a GPU if there is one.
        progress: show a bar. Default: on a terminal.
        overwrite: replace what is in ``out``.
        trust_remote_code: run code that comes with the language model.

    Returns:
        How many images were captioned, could not be used, and had been done before.

    Raises:
        ValueError, OSError: naming the option, the model or the source.
    """
    check_device(device)
    if model.lower().endswith(SUFFIXES):
        raise ValueError(f"{model} is an image, where a model is expected: the model comes first, then the images.")
    for source in sources:
        if not is_remote(source) and not os.path.exists(source):
            raise FileNotFoundError(f"{source}: there is no such image or folder.")
        if is_remote(source) and not source.lower().endswith(SUFFIXES):
            Remote(source).check_readable()
    if min(batch_size, max_new_tokens, num_beams) < 1 or (num_workers or 0) < 0 or temperature < 0:
        raise ValueError("batch_size, max_new_tokens and num_beams are at least 1, num_workers and temperature 0.")
    if page is not None:
        Path(page).expanduser().parent.mkdir(parents=True, exist_ok=True)
    decoding = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "temperature": temperature, "seed": seed}
    lines = Path(out).expanduser()
    settings = {"model": model, "prompt": prompt, **decoding}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": temperature > 0}
    options |= {"probabilities": page is not None, **({"temperature": temperature} if temperature > 0 else {})}
    with sole_writer(lines, "out"):
        done = {line["image"] for line in begin_lines(lines, settings, overwrite)}
        captioner = load(model, trust_remote_code)
        model_inputs(captioner.processor, [Image.new("RGB", (64, 64))], prompt)  # or refuse the prompt now
        captioner.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.manual_seed(seed)
        images = Images(sources, done)
        counts = {"captioned": 0, "errors": 0, "before": len(done)}
        disable = None if progress is None else not progress
        with open(lines, "a") as file, tqdm(unit=" images", disable=disable) as bar:
            for batch in caption_loaded(captioner, images, batch_size, num_workers, prompt, options):
                for image, caption in batch:
                    line: dict[str, Any] = {"error": image.error} if caption is None else {"caption": caption.text}
                    if caption is not None and page is not None:
                        line["tokens"] = caption.pieces
                    file.write(json.dumps({"image": image.name, **line}) + "\n")
                    counts["errors" if caption is None else "captioned"] += 1
                file.flush()
                bar.update(len(batch))
    if page is not None:
        Path(page).expanduser().write_text(_page(lines, f"Captions of {model}"), encoding="utf-8")
    return counts


def _page(lines: Path, title: str) -> str:
    """Make a page of the first captions of a file; captions of calls without a page have no shades."""
    cards = []
    with open(lines) as file:
        for line in islice((line for line in map(json.loads, file) if "caption" in line), PAGE_IMAGES):
            data = b""
            with suppress(Exception):  # whatever it is: the image was there when it was captioned
                data = read_bytes(line["image"])
            pieces = [line.get("tokens") or [(line["caption"], None)]]
            cards.append(sample_card(line["image"], data, [line["caption"]], pieces, full=(1.0,)))
    return samples_page(cards, title, above=legend("The stronger the colour of a token, the more probable it was"))


def caption_loaded(
    model: ImageTextModel,
    images: Images,
    batch_size: int,
    num_workers: int | None,
    prompt: str | None,
    options: Mapping[str, Any],
) -> Iterator[list[tuple[Decoded, Caption | None]]]:
    """Yield batches of images, each with its caption, or None if it cannot be used.

    ``num_workers`` and ``prompt`` are those of :func:`caption_images`, and ``options`` those of
    :meth:`.ImageTextModel.generate`. The model is in evaluation mode.
    """
    if num_workers is None:  # a model on the CPU has all cores, and workers would take them from it
        on_cpu = model.model.device.type == "cpu"
        num_workers = min(8, max(0, (os.cpu_count() or 1) - (torch.get_num_threads() if on_cpu else 1)))
    prepare = partial(_prepare, model.processor, prompt)
    for batch, inputs in DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=prepare):
        captions = iter(model.generate(inputs, **options) if inputs else [])
        yield [(image, None if image.error else next(captions)) for image in batch]


def _prepare(
    processor: Any, prompt: str | None, batch: list[Decoded]
) -> tuple[list[Decoded], dict[str, torch.Tensor] | None]:
    """Prepare a batch in a worker; an image that the processor cannot take becomes one that cannot be used."""
    usable = [one.image for one in batch if one.image is not None]
    try:
        inputs = model_inputs(processor, usable, prompt) if usable else None
    except Exception as error:  # whatever a processor raises
        if len(batch) == 1:
            return [Decoded(batch[0].name, None, one_line(error))], None
        alone = [_prepare(processor, prompt, [one])[0][0] for one in batch]
        if [one.error for one in alone] == [one.error for one in batch]:  # the batch is refused, and none of its images
            raise
        pairs = zip(batch, alone, strict=True)
        return _prepare(processor, prompt, [bad if bad.error else one for one, bad in pairs])
    return [one._replace(image=None) for one in batch], inputs  # the model needs no more of them
