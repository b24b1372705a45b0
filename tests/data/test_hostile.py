"""Whatever captions and images hold: a sample or a BadSampleError, and everything that belongs to a token beside it."""

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.models import patch_inputs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from streaming import MDSWriter

from composer_prior import StreamingCaptionDataset
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.captions import BadSampleError, decode_image
from composer_prior.data.images import IMAGE_FORMATS
from composer_prior.data.scores import ScoresMetadata
from composer_prior.scoring.writer import ScoresWriter

pytestmark = pytest.mark.slow

LONGEST = 40
IMAGE = io.BytesIO()
Image.new("RGB", (16, 8), "red").save(IMAGE, "PNG")
SOME = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MANY = settings(SOME, max_examples=300)
HOSTILE = [
    "<image><row><bos><eos><pad>",
    "\x00\x01\x02\x1b[31m\x7f",
    "\u202eright to left\u202c \u2066isolated\u2069",
    "e\u0301" * 50 + "\u200d\ufeff\ufffd",
    "👩‍👩‍👧‍👦🏳️‍🌈" * 9,
    "x" * 100_000,
    "\u0301" * 100_000,
    " \n\t" * 1000 + "a",
    "'; DROP TABLE captions; --",
]
CAPTIONS = st.one_of(
    st.text(max_size=80),
    st.text(st.characters(categories=["Cc", "Cf", "Mn", "Zs", "So"]), max_size=80),
    st.sampled_from(HOSTILE),
)


@st.composite
def samples(draw: Any) -> list[dict[str, Any]]:
    """Captions with spans of them, some unknown."""
    found = []
    for caption in draw(st.lists(CAPTIONS, min_size=1, max_size=6)):
        edge = st.integers(0, len(caption))
        pairs = st.lists(st.tuples(edge, edge).map(sorted), max_size=3)
        found.append({"image": IMAGE.getvalue(), "caption": caption, "image_related_spans": draw(st.none() | pairs)})
    return found


def score(position: int, index: int) -> float:
    """One that says to which token it belongs, exact in float16."""
    return -(position + 1) - index / 8


def write_scores(folder: Path, data: StreamingCaptionDataset, captions: list[str]) -> str:
    ids = [data.tokenizer(c, add_special_tokens=False, split_special_tokens=True)["input_ids"] for c in captions]
    lengths = [min(len(i) + 1, LONGEST) if c.strip() else 0 for i, c in zip(ids, captions, strict=True)]
    writer = ScoresWriter(str(folder), ScoresMetadata.of(data, {}), unit_samples=100)
    writer.begin()
    values = [np.array([score(p, i) for p in range(n)], np.float32) for i, n in enumerate(lengths)]
    writer.finish({0: writer.write(0, values)})
    return str(folder)


@SOME
@given(samples())
@example([{"image": IMAGE.getvalue(), "caption": text, "image_related_spans": [[0, 7]]} for text in HOSTILE])
def test_whatever_a_caption_holds_its_tokens_stay_aligned(tokenizer, items):
    with tempfile.TemporaryDirectory() as folder:
        columns = {"image": "bytes", "caption": "str", "image_related_spans": "json"}
        with MDSWriter(out=f"{folder}/data", columns=columns) as writer:
            for sample in items:
                writer.write(sample)
        arguments = {
            "local": f"{folder}/data",
            "tokenizer": tokenizer,
            "image_processor": lambda image: patch_inputs(image, 8, 32),
            "batch_size": 1,
            "prompt": "Say: ",
            "max_caption_tokens": LONGEST,
        }
        plain = StreamingCaptionDataset(**arguments)
        scores = write_scores(Path(folder, "scores"), plain, [sample["caption"] for sample in items])
        del plain
        data = StreamingCaptionDataset(**arguments, scores=scores)
        for index, sample in enumerate(items):
            if not sample["caption"].strip():
                with pytest.raises(BadSampleError, match="the caption is empty"):
                    data[index]
                continue
            check_sample(data, data[index], sample, index)


def check_sample(data: StreamingCaptionDataset, item: dict[str, Any], sample: dict[str, Any], index: int) -> None:
    caption, tokenizer = sample["caption"], data.tokenizer
    encoding = tokenizer(caption, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    expected = [*encoding["input_ids"], tokenizer.eos_token_id][:LONGEST]
    labelled = item["labels"] != IGNORE_INDEX
    first = len(item["labels"]) - len(expected)
    assert labelled.tolist() == [False] * first + [True] * len(expected)
    assert item["labels"][first:].tolist() == item["input_ids"][first:].tolist() == expected
    assert not set(expected[:-1]) & set(tokenizer.all_special_ids), "no caption spells a special token"
    if len(encoding["input_ids"]) < LONGEST:
        assert tokenizer.decode(expected[:-1], clean_up_tokenization_spaces=False) == caption
    related = torch.zeros(len(item["labels"]), dtype=torch.bool)
    for place, (start, end) in enumerate(encoding["offset_mapping"][:LONGEST]):
        # A token without characters of its own, such as a space that the tokenizer trims, stands between two of them.
        inside = [start - 1, start] if start == end else range(start, end)
        common = [len(set(inside) & set(range(*span))) for span in sample["image_related_spans"] or []]
        related[first + place] = max(common, default=0) > (start == end)
    assert torch.equal(item["image_related"], related)
    values = [score(place, index) for place in range(len(expected))]
    assert item["ref_logprobs"].tolist() == [0.0] * first + values


@contextmanager
def suppress_if(kind: type[Exception], pattern: str) -> Iterator[None]:
    """Accept an error with this message."""
    try:
        yield
    except kind as error:
        if not re.match(pattern, str(error)):
            raise AssertionError(f"unexpected message: {error}") from error


def encoded(form: str) -> bytes:
    """A small image of a format, with noise, so that every byte matters."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


ENCODED = {form: encoded(form) for form in IMAGE_FORMATS}


def check_image_bytes(data: bytes) -> None:
    try:
        image = decode_image(data)
    except BadSampleError:
        return
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_images_truncated_at_every_length(form):
    for length in range(len(ENCODED[form])):
        check_image_bytes(ENCODED[form][:length])


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_images_with_one_flipped_bit_in_each_byte(form):
    data = ENCODED[form]
    for position in range(len(data)):
        flipped = data[position] ^ (1 << position % 8)
        check_image_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])


@MANY
@given(st.sampled_from(IMAGE_FORMATS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=20))
def test_images_with_many_wrong_bytes(form, changes):
    data = bytearray(ENCODED[form])
    for place, value in changes:
        data[int(place * len(data))] = value
    check_image_bytes(bytes(data))


@MANY
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"%!PS", b"<svg"]),
)
def test_bytes_that_are_no_image(data, magic):
    check_image_bytes(magic + data)


@pytest.mark.parametrize(
    "data", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7\n"]
)
def test_formats_that_run_programs_are_not_decoded(data):
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode_image(data)


@SOME
@given(st.data())
def test_a_damaged_shard_gives_samples_or_names_itself(tokenizer, data):
    with tempfile.TemporaryDirectory() as folder:
        columns = {"image": "bytes", "captions": "json", "image_related_spans": "json"}
        with MDSWriter(out=folder, columns=columns) as writer:
            for text in ("a fox", "a snail"):
                writer.write({"image": IMAGE.getvalue(), "captions": [text], "image_related_spans": [[[2, 5]]]})
        (shard,) = Path(folder).glob("*.mds")
        content = bytearray(shard.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            place = data.draw(st.integers(4, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
        shard.write_bytes(content)
        captions = StreamingCaptionDataset(
            local=folder, tokenizer=tokenizer, image_processor=lambda image: patch_inputs(image, 8, 32), batch_size=1
        )
        for index in range(2):
            place = re.escape(f"sample {index} (number {index} of ./shard.00000.mds): ")
            with suppress_if(BadSampleError, place):
                assert captions[index]["sample_id"] == index
