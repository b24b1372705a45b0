"""What composer-prior accepts as an image: encoded bytes that Pillow can decode, checked as cheaply as possible.

Nothing here trusts its input. Only the raster formats in :data:`IMAGE_FORMATS` are ever handed to Pillow (so no PDF,
EPS or SVG interpreter is reachable), and an image with more than :data:`MAX_IMAGE_PIXELS` pixels is refused from its
header. An animated image stands for its first frame; CMYK, palette, grey and transparent images are accepted, because
:func:`decode_rgb` turns each of them into RGB.
"""

from __future__ import annotations

import io
import re
import warnings
from functools import lru_cache
from typing import NoReturn

from PIL import Image, ImageOps

__all__ = ["IMAGE_FORMATS", "MAX_IMAGE_PIXELS", "ImageError", "check_image", "decode_rgb", "reencode_image"]

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's own limit, at which Pillow only warns; here it is an error."""

_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff]")
_JPEG_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a stuffed zero, a restart or fill
_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})  # markers without a segment
_JPEG_SCAN = 0xDA
_JPEG_END = b"\xff\xd9"
_JPEG_SAMPLE_SIZE = bytes((0, 16, 0, 16))  # height and width
_JPEG_SAMPLE_KEPT = 16 << 10  # bytes of the largest headers that are remembered


class ImageError(ValueError):
    """Bytes that are not an acceptable image.

    Args:
        reason: a short fixed phrase, the same for every image that fails in the same way.
        detail: what exactly is wrong.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def check_image(data: bytes, check: str = "structure") -> None:
    """Raises unless ``data`` is an image that Pillow can decode.

    ``check="full"`` decodes the whole image (a JPEG at an eighth of its size, which reads every entropy-coded bit).
    ``check="structure"`` is many times faster. A JPEG must go on to its end marker, and a tiny image must decode with
    its headers and tables; a PNG must have the right checksum on every chunk, up to its end chunk; a WebP must be as
    long as it says. Whatever is doubtful, and every other format, is decoded. So an image that decodes is never
    refused, and a cut image or a damaged header is always caught; damage *inside* the compressed pixels of a complete
    JPEG or WebP may pass, and whoever decodes the image later must be ready for it.

    Args:
        data: the encoded image.
        check: ``"structure"`` or ``"full"``.

    Raises:
        ImageError: the image is empty, SVG, of an unknown format, a decompression bomb, truncated or undecodable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if check == "structure" and _structure_is_sound(data):
            return
        _decode(data, shrink=True)


def decode_rgb(data: bytes) -> Image.Image:
    """The first frame of an encoded image as RGB: upright (EXIF orientation), transparency laid on white.

    Args:
        data: the encoded image.

    Returns:
        A loaded Pillow image of mode ``RGB``.

    Raises:
        ImageError: as for :func:`check_image`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _decode(data)
        try:
            ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image if image.mode == "RGB" else image.convert("RGB")
        except Exception as error:
            _refuse(data, error)


def reencode_image(data: bytes, resize: int | None, reencode: str | None) -> bytes:
    """Shrinks and encodes an image anew; returns ``data`` itself where nothing has to change.

    Args:
        data: the encoded image.
        resize: the longest side allowed, in pixels; the aspect ratio is kept and nothing is enlarged.
        reencode: ``"jpeg"``, ``"png"`` or ``"webp"``, with an optional quality as in ``"jpeg:90"``. Without it, an
            image that has to shrink becomes a JPEG of quality 95, and any other stays as it is.

    Returns:
        The encoded image.

    Raises:
        ImageError: as for :func:`check_image`.
    """
    image = decode_rgb(data)
    too_large = resize is not None and max(image.size) > resize
    if not too_large and reencode is None:
        return data
    if too_large and resize is not None:
        image.thumbnail((resize, resize), Image.Resampling.BICUBIC)
    form, _, quality = (reencode or "jpeg:95").partition(":")
    buffer = io.BytesIO()
    image.save(buffer, form.upper(), **({} if form == "png" else {"quality": int(quality or 95)}))
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    """Reads the header, and refuses a bomb before any pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        _refuse(data, error)
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError("decompression bomb", f"{width} x {height} pixels, at most {MAX_IMAGE_PIXELS} are accepted")
    return image


def _decode(data: bytes, shrink: bool = False) -> Image.Image:
    image = _open(data)
    try:
        if shrink:
            image.draft("RGB", (1, 1))
        image.load()
    except Exception as error:
        _refuse(data, error)
    return image


def _refuse(data: bytes, error: Exception) -> NoReturn:
    """Turns whatever Pillow raised into an ImageError whose text is the same in every run."""
    message = str(error)
    if not data:
        raise ImageError("empty image") from error
    if isinstance(error, Image.DecompressionBombError):
        raise ImageError("decompression bomb", message) from error
    if b"<svg" in data[:4096].lower():
        raise ImageError("SVG image", "SVG is not decoded; render it to PNG first") from error
    if isinstance(error, Image.UnidentifiedImageError):
        raise ImageError("undecodable image", f"not one of {', '.join(IMAGE_FORMATS)}") from error
    reason = "truncated image" if "truncated" in message.lower() else "undecodable image"
    raise ImageError(reason, re.sub(r" at 0x[0-9a-f]+", "", message)[:200] or type(error).__name__) from error


def _structure_is_sound(data: bytes) -> bool:
    """Whether the cheap checks are enough to accept; ``False`` means doubt, and the image has to be decoded."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            sample = _jpeg_sample(data)
            if sample is None:
                return False
            return (_decodes if len(sample) <= _JPEG_SAMPLE_KEPT else _decodes.__wrapped__)(sample)
        if data.startswith(b"\x89PNG"):
            _open(data).verify()
            return True
        if data.startswith(b"RIFF"):
            _open(data)
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    except Exception:
        return False
    return False


@lru_cache(maxsize=64)
def _decodes(sample: bytes) -> bool:
    """Whether Pillow decodes it. The images that one program wrote often have the same tables, and so one sample."""
    _decode(sample)
    return True


def _jpeg_sample(data: bytes) -> bytes | None:
    """A tiny JPEG with the headers and tables of a complete one, all grey; ``None`` where there is any doubt.

    No end marker can occur within entropy-coded data, so a file that ends with one was not cut in the middle of a scan.
    """
    position, frame = 2, None
    while (found := _JPEG_MARKER.match(data, position)) is not None:
        marker, start = data[found.end() - 1], found.end()
        position = start + int.from_bytes(data[start : start + 2], "big")
        if marker in _JPEG_FRAMES and frame is None:
            frame = start
        elif marker == _JPEG_SCAN and frame is not None:
            height, width = (int.from_bytes(data[frame + at : frame + at + 2], "big") for at in (3, 5))
            if not 0 < height * width <= MAX_IMAGE_PIXELS or not (data.endswith(_JPEG_END) or _ends(data, position)):
                return None
            return data[: frame + 3] + _JPEG_SAMPLE_SIZE + data[frame + 7 : position] + _JPEG_END
        elif marker in _JPEG_FRAMES or marker in _JPEG_ALONE:
            return None
    return None


def _ends(data: bytes, position: int) -> bool:
    """Whether the scans of a JPEG follow each other up to an end marker; whatever follows that does not matter."""
    while (found := _JPEG_AFTER_SCAN.search(data, position)) is not None:
        marker, start = data[found.end() - 1], found.end()
        if marker == _JPEG_END[1] or marker in _JPEG_FRAMES or marker in _JPEG_ALONE:
            return marker == _JPEG_END[1]
        position = start + int.from_bytes(data[start : start + 2], "big")
    return False
