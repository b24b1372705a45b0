"""Describe a data set: counts, lengths, sizes, frequent captions or turns, and a page of samples as HTML.

Reading goes through streaming. A data set with a column that would run code when decoded (``pkl``) is refused.
"""

import dataclasses
import io
import json
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from composer_prior.conversion.sources.base import expect_number
from composer_prior.data.conversations import ANSWER, DOCUMENT, ChatError, checked, unpack_images
from composer_prior.data.images import IMAGE_FORMATS
from composer_prior.data.messages import one_line, short, visible
from composer_prior.data.opening import open_captions, sample_captions
from composer_prior.reports.page import Shade, legend, sample_card, samples_page


@dataclass
class CaptionReport:
    """Figures of a data set, from :func:`inspect_captions`."""

    samples: int
    shards: int
    bytes: int  # of the shards
    read: int  # samples that the figures below are of
    unit: str  # of caption lengths
    kind: str = "captions"  # or turns
    lengths: list[int] = field(default_factory=list, repr=False)  # of each caption, or turn of a conversation
    sizes: list[tuple[int, int]] = field(default_factory=list, repr=False)  # width and height of each image
    formats: Counter[str] = field(default_factory=Counter)  # of images
    undecodable: int = 0  # images
    unusable: int = 0  # conversations and documents
    counts: Counter[str] = field(default_factory=Counter, repr=False)  # of each caption

    @property
    def captions(self) -> int:
        """The number of captions."""
        return self.counts.total()

    @property
    def frequent(self) -> list[tuple[str, int]]:
        """The ten most frequent captions and their counts."""
        return self.counts.most_common(10)

    def __str__(self) -> str:
        widths, heights = [width for width, _ in self.sizes], [height for _, height in self.sizes]
        part = "" if self.read == self.samples else f"; the figures below are of {self.read:,} of them, drawn at random"
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.most_common())
        lines = [
            f"{self.samples:,} samples in {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB{part}",
            f"{self.kind:15} {self.captions:,}",
            f"{self.kind[:-1] + ' length':15} {_spread(self.lengths)} {self.unit}",
            f"image width     {_spread(widths)} pixels",
            f"image height    {_spread(heights)} pixels",
            f"image formats   {formats or 'none'}",
            f"undecodable     {self.undecodable:,}",
            *([f"unusable        {self.unusable:,}"] if self.unusable else []),
            f"most frequent {self.kind}:",
            *(f"  {count:>7,}  {visible(short(caption, 100))}" for caption, count in self.frequent),
        ]
        return "\n".join(lines)


def inspect_captions(
    data: str | Path,
    *,
    page: str | Path | None = None,
    tokenizer: str | None = None,
    scores: str | None = None,
    alpha: float = 1.0,
    floor: float = 0.0,
    limit: int | None = 100_000,
    samples: int = 48,
    seed: int = 0,
) -> CaptionReport:
    """Read a caption data set and describe it.

    Args:
        data: a folder, or a remote such as ``s3://bucket/captions``.
        page: where to write the page of samples, as one HTML file.
        tokenizer: a Hugging Face tokenizer to count tokens with. Default: the reference's, where there are scores that
            it belongs to, and OpenCLIP's otherwise, which comes with the package.
        scores: folder or remote of the reference's stored log-probabilities; the page then shades each token by its
            weight, normalized as in PRIOR.
        alpha: exponent of :func:`.importance_weights`.
        floor: smallest weight of :func:`.importance_weights`.
        limit: how many samples to read for the figures, drawn at random; ``None`` reads all.
        samples: how many samples the page shows.
        seed: what is drawn depends on it alone.

    Returns:
        The figures; as text they are a few lines.

    Raises:
        FileNotFoundError: there is no ``index.json``.
        ValueError: a column is missing, or one is of an encoding that could run code.
        ScoresError: the scores belong to other data or another tokenizer, naming what differs.
    """
    if page is not None:
        Path(page).expanduser().parent.mkdir(parents=True, exist_ok=True)
    expect_number("samples", samples, 0)
    if limit is not None:
        expect_number("limit", limit, 1)
    for name, value in (("alpha", alpha), ("floor", floor)):
        expect_number(name, value, 0, whole=False)
    with tempfile.TemporaryDirectory() as cache:
        dataset, index = open_captions(str(data), cache, messages=True)
        shards, count = json.loads(index)["shards"], len(dataset)
        shades = None
        kind = "turns" if any("messages" in shard["column_names"] for shard in shards) else "captions"
        if scores is not None and kind == "turns":
            raise ValueError(f"{data}: scores= shades captions alone; leave it out for conversations.")
        if scores is not None:
            shades, tokenizer = _shades(scores, tokenizer, index, count, Path(cache, "scores"), alpha, floor)
        if tokenizer is None:
            from open_clip.tokenizer import SimpleTokenizer

            encode, unit = SimpleTokenizer().encode, "tokens of OpenCLIP's tokenizer"
        else:
            encode, unit = partial(_load_tokenizer(tokenizer).encode, add_special_tokens=False), "tokens"
        drawn = random.Random(seed)
        numbers = range(count) if limit is None or limit >= count else sorted(drawn.sample(range(count), limit))
        shown = set(drawn.sample(list(numbers), min(samples, len(numbers))))
        cards: list[str] = []
        size = sum(shard["raw_data"]["bytes"] for shard in shards)
        report = CaptionReport(count, len(shards), size, len(numbers), unit, kind)
        for number in numbers:
            try:
                sample = dataset[number]
            except (LookupError, ValueError, RuntimeError) as error:
                raise ValueError(f"{data}: sample {number} cannot be read ({one_line(error)}).") from error
            try:
                captions, images, labels = _contents(sample)
            except ChatError as error:
                report.unusable += 1
                bad = sample_card(number, [], [str(error)], None, ["a sample that cannot be used"])
                cards += [bad] if number in shown else []
                continue
            if not all(isinstance(caption, str) for caption in captions):
                raise ValueError(f"{data}: the captions of sample {number} are not texts; convert the data again.")
            report.counts.update(captions)
            report.lengths += [len(encode(caption)) for caption in captions]
            for image in images:
                try:
                    opened = Image.open(io.BytesIO(image), formats=IMAGE_FORMATS)  # reads the header alone
                    report.formats[opened.format or "unknown"] += 1
                    report.sizes.append(opened.size)
                except Exception:
                    report.undecodable += 1
            if number in shown:
                pieces = shades(number, sample) if shades else None
                cards.append(sample_card(number, images, captions, pieces, labels))
    if page is not None:
        says = "The stronger the colour of a token, the larger its weight, of which the mean over a caption is 1"
        above = legend(says, None) if shades else ""
        Path(page).expanduser().write_text(samples_page(cards, f"{data}", f"{report}", above), encoding="utf-8")
    return report


def _contents(sample: Mapping[str, Any]) -> tuple[list[str], list[bytes], list[str]]:
    """Return the captions of a sample, or the turns of a conversation; its images; and what is above each turn.

    Raises:
        ChatError: for a conversation that cannot be used.
    """
    if "messages" not in sample:
        return sample_captions(sample), [sample["image"]], []
    turns, images = checked(sample["messages"]), unpack_images(sample["images"])
    learned = [one["role"] in (ANSWER, DOCUMENT) and one.get("weight", 1) for one in turns]
    labels = [f"{one['role']}, learned" if known else one["role"] for one, known in zip(turns, learned, strict=True)]
    return ["".join(part.get("text", "<image>") for part in one["content"]) for one in turns], images, labels


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{ordered[0]:,} to {ordered[-1]:,}, median {statistics.median(ordered):,.0f}, 95 % up to {high:,}"


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from composer_prior.data.hub import load_pretrained

    return load_pretrained(AutoTokenizer, name)


def _shades(
    path: str, tokenizer: str | None, index: bytes, samples: int, cache: Path, alpha: float, floor: float
) -> tuple[Callable[[int, Mapping[str, Any]], list[list[Shade]] | None], str]:
    """Return a function that cuts a sample's caption into pieces with weights from stored scores, and the tokenizer."""
    import torch

    from composer_prior.algorithms.prior.weights import importance_weights
    from composer_prior.data.scores import COLUMN, Scores, ScoresError, index_fingerprint
    from composer_prior.data.tokenizer import add_image_tokens, encode_caption, tokenizer_fingerprint
    from composer_prior.scoring.align import token_edges

    scores = Scores(path, cache)
    metadata = scores.metadata
    if metadata.column != COLUMN:
        raise ScoresError(
            f"{path} holds a viewer's scores, and the page shows PRIOR's weights: give scores= the folder of a "
            "reference's, which composer-prior score makes."
        )
    name = metadata.reference["path"] if tokenizer is None else tokenizer
    loaded = _load_tokenizer(name)
    add_image_tokens(loaded)
    known = tokenizer_fingerprint(loaded)
    if tokenizer is None and known != metadata.tokenizer:
        raise ValueError(
            f"{path}: the reference has another tokenizer than the model; name the model's with tokenizer=."
        )
    expected = dataclasses.replace(metadata, data=index_fingerprint([index]), samples=samples, tokenizer=known)
    metadata.check(expected, path)

    def pieces(number: int, sample: Mapping[str, Any]) -> list[list[Shade]] | None:
        caption = sample["caption"]
        encoding = encode_caption(loaded, caption)
        tokens = min(len(encoding.ids) + 1, metadata.max_caption_tokens)
        if not len(scores[number]):
            return None  # a sample that was skipped
        logprobs = torch.from_numpy(scores.read(number, tokens))[None]
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        weights = importance_weights(logprobs, mask, alpha, floor=floor)[0].tolist()
        edges = token_edges(encoding.offsets, len(caption)).tolist()
        return [_pieces(caption, edges, weights, loaded.eos_token)]

    return pieces, name


def _pieces(caption: str, edges: Sequence[float], weights: Sequence[float], end: str) -> list[Shade]:
    """Cut a caption at the tokens' edges; tokens that share a character are one piece, of their average weight."""
    found: list[Shade] = []
    start, waiting = 0, list[float]()
    for edge, weight in zip(edges[1:], weights, strict=False):
        waiting.append(weight)
        if edge == int(edge):
            found.append((caption[start : int(edge)], statistics.mean(waiting)))
            start, waiting = int(edge), []
    if len(weights) == len(edges):  # the last one is that of the end of the sequence
        found.append((end, weights[-1]))
    elif start < len(caption):
        found.append((caption[start:], None))
    return found
