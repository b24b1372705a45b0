"""Models for benchmarks whose answers are functions of the image, and files of images to ask about."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from composer_prior.models.image_text_model import TokenLogprobs


class FakeModel:
    """A vision-language model.

    Args:
        caption: of an image.
        score: log-probability of a text beside an image and a prompt.
    """

    def __init__(
        self,
        caption: Callable[[Image.Image], str] = lambda image: "",
        score: Callable[[Image.Image, str, str | None], float] = lambda image, text, prompt: 0.0,
    ):
        self.caption = caption
        self.score = score

    def logprobs(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        return [
            [TokenLogprobs([self.score(image, text, prompt)], [(0, len(text))]) for text in some]
            for image, some in zip(images, texts, strict=True)
        ]

    def generate_captions(
        self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64
    ) -> list[str]:
        return [self.caption(image) for image in images]


def shade(image: Image.Image) -> int:
    """Return the number that :func:`write_image` put into an image; 127 for a blank one."""
    return image.convert("RGB").getpixel((0, 0))[0]


def write_image(file: Path, number: int, size: tuple[int, int] = (8, 6)) -> Path:
    """Write an image of one colour that encodes a number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 0, 0)).save(file, "PNG")  # whatever its name says: Pillow looks at the bytes
    return file


def write_json(file: Path, content: Any) -> str:
    """Write a file of JSON, or of JSON Lines if its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.suffix == ".jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content))
    return str(file)
