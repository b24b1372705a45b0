"""Image-caption pairs as benchmarks read them: in order, one at a time, nothing shuffled."""

import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from composer_prior.data.captions import SPANS_COLUMN, BadSampleError, decode_image
from composer_prior.data.messages import DataError, one_line
from composer_prior.data.scores import index_fingerprint
from composer_prior.reports.inspection import open_captions, sample_captions


class CaptionSample(NamedTuple):
    """One image.

    Args:
        image: RGB.
        encoded: its bytes, as they are stored.
        captions: at least one.
        spans: ``[start, end)`` characters of the caption that the image determines; None where nobody knows.
    """

    image: Image.Image
    encoded: bytes
    captions: list[str]
    spans: list[tuple[int, int]] | None


class CaptionSamples:
    """An MDS data set of image-caption pairs by number.

    Args:
        data: a folder, or a remote such as ``s3://bucket/captions``.

    Raises:
        FileNotFoundError: there is no ``index.json``.
        ValueError: a column is missing, or one is of an encoding that could run code.
    """

    def __init__(self, data: str):
        self.data = data
        self._cache = tempfile.TemporaryDirectory()
        self._dataset, index = open_captions(data, self._cache.name)
        self.fingerprint = index_fingerprint([index])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> CaptionSample:
        try:
            sample: Mapping[str, Any] = self._dataset[number]
            image = decode_image(sample["image"])
        except (LookupError, ValueError, RuntimeError, BadSampleError) as error:
            raise DataError(f"{self.data}: sample {number} cannot be read ({one_line(error)}).") from error
        return CaptionSample(image, sample["image"], sample_captions(sample), sample.get(SPANS_COLUMN))
