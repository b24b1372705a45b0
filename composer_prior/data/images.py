"""Images: encoded bytes that Pillow can decode, checked as cheaply as possible.

The input is not trusted. Only the raster formats in ``IMAGE_FORMATS`` are ever handed to Pillow (so no PDF,
EPS or SVG interpreter is reachable), and an image with more than ``MAX_IMAGE_PIXELS`` pixels, or with one side more
than ``MAX_ASPECT_RATIO`` times the other, is refused from its header. An animated image stands for its first frame,
and :func:`decode_rgb` turns every kind of pixel into RGB.

A full check and decoding are one function, so they agree on every image. Invalid orientation, transparency and other
metadata are ignored.
"""

import base64
import errno
import io
import math
import os
import re
import warnings
import zlib
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps

from composer_prior.data.files import read_plain

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own limit, at which Pillow only warns; here it is an error
MAX_IMAGE_BYTES = 64 << 20  # of an encoded image; a larger file is not read
MAX_ASPECT_RATIO = 50
"""Long side to short side. Panoramas reach 10, receipts 20, screenshots of whole pages 50; a tower that fits the short
side to its square and then crops makes that many squares: 20 MB and 0.1 s at 336 pixels, 170 MB and 0.6 s at 1,024."""

_MAGIC = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8",
    "BMP": rb"BM.{4}\x00{4}",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
}
_OTHER_KINDS = (  # files that are often found instead of an image
    ("HTML page", rb"\s*(?><!--.*?-->\s*)*+<(!doctype\s+html|html|head|body|script)\b", "a failed download?"),
    ("SVG image", rb".{,4096}<svg", "SVG is not decoded; render it to PNG first"),
    ("XML document", rb"\s*<\?xml", "a failed download?"),
    ("JSON document", rb"\s*({\s*[\"}]|\[\s*[\"{[\]])", "a failed download?"),
    ("Git LFS pointer", rb"version https://git-lfs", "the image itself is not there; run git lfs pull"),
    ("AVIF image", rb".{4}ftypavi[fs]", ""),
    ("HEIC image", rb".{4}ftyp(hei|hev|mif|msf)", ""),
    ("video", rb".{4}ftyp|\x1a\x45\xdf\xa3", ""),
    ("JPEG XL image", rb"\xff\x0a|\x00{3}\x0cJXL ", ""),
    ("JPEG 2000 image", rb"\xff\x4f\xff\x51|\x00{3}\x0cjP  ", ""),
    ("PDF document", rb"%PDF-", ""),
    ("PostScript document", rb"%!PS", ""),
    ("Photoshop image", rb"8BPS", ""),
    ("archive", rb"PK\x03\x04|\x1f\x8b|BZh|7z\xbc\xaf|\xfd7zXZ", ""),
)

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEY_BYTES = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}  # length of tRNS, by colour type
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_BASE64 = re.compile(r"\s*[A-Za-z0-9+/_\-\r\n]{36}")
_URL_SAFE = str.maketrans("-_", "+/")


class ImageError(ValueError):
    """Bytes that are no acceptable image: a fixed phrase for all that fail in the same way, and the exact problem."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def read_image_file(path: str | os.PathLike[str], limit: int = MAX_IMAGE_BYTES) -> bytes:
    """Read a file, or raise ImageError if it is missing, unreadable, no plain file, or of more than ``limit`` bytes."""
    try:
        return read_plain(path, limit)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("missing file") from None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):
            raise ImageError("not a regular file") from None
        kind = "image too large" if error.errno == errno.EFBIG else "unreadable file"
        raise ImageError(kind, error.strerror or str(error)) from None


def image_in_text(text: str, is_path: bool = True) -> bytes | None:
    """Decode an image that a text holds as a data URI or as any kind of base64; return None for a path."""
    start, comma, data = text.partition(",") if text[:5].lower() == "data:" else ("base64", "", text)
    if not comma and is_path and not _BASE64.match(text):
        return None
    if not comma and is_path and not _format(_decoded(text[:36])) and max(map(len, text.split("/"))) < 256:
        return None
    found = _decoded(unquote(data)) if start.rstrip().lower().endswith("base64") else unquote_to_bytes(data)
    if not found:
        raise ImageError("empty image")
    return found


def _decoded(text: str) -> bytes:
    text = "".join(text.split()).rstrip("=").translate(_URL_SAFE)
    if wrong := re.search(r"[^A-Za-z0-9+/]", text):
        raise ImageError("undecodable image", f"its base64 has {wrong[0]!r} as character {wrong.start() + 1}")
    text = text[: len(text) - (len(text) % 4 == 1)]  # one character alone is cut
    return base64.b64decode(text + "=" * (-len(text) % 4))


def check_image(data: bytes, check: str = "structure") -> None:
    """Raise unless ``data`` is an image that Pillow can decode.

    ``check="full"`` decodes the image, and so accepts the same images as :func:`decode_rgb` (a JPEG at an eighth of its
    size, which reads every entropy-coded bit). ``check="structure"`` is many times faster: Pillow must read the header;
    a JPEG must end with its end marker, a PNG must have the right checksum on every chunk, up to its end chunk, and a
    WebP must be as long as its header states. Images that fail these checks, and all other formats, are decoded. So an
    image that decodes is never refused, and a cut image is always refused; damage *inside* a complete JPEG or WebP may
    pass, and the loader has to handle it.

    Raises:
        ImageError: the image is empty, truncated, damaged, of another format or none, a decompression bomb, of an
            extreme aspect ratio, or has pixel values of an unknown range.
    """
    with warnings.catch_warnings(action="ignore"):
        if check != "structure" or not _structure_is_sound(data):
            _decode(data, shrink=True)


def decode_rgb(data: bytes) -> Image.Image:
    """Decode the first frame of an image as RGB: upright (EXIF orientation), transparency laid on white.

    Grey of more than 8 bits is scaled, black to white over the range of its file. Up to 16 bits, the bits say it; for
    integers of 32 bits it is the least of 255, 65535 and 2^31 - 1 that holds the largest value, for floats the least of
    1, 255 and 65535. An image with values outside, such as negative ones, is refused. The result is loaded and has no
    metadata; for errors see :func:`check_image`.
    """
    with warnings.catch_warnings(action="ignore"):
        return _decode(data)


def reencode_image(data: bytes, resize: int | None, reencode: str | None) -> bytes:
    """Shrink and encode an image anew, and return its bytes; return ``data`` itself where nothing has to change.

    Args:
        data: the encoded image.
        resize: the longest side allowed, in pixels; the aspect ratio is kept and nothing is enlarged.
        reencode: ``"jpeg"``, ``"png"`` or ``"webp"``, with an optional quality as in ``"jpeg:90"``. Without it, an
            image that has to shrink becomes a JPEG of quality 95, and any other stays as it is.

    Raises:
        ImageError: as for :func:`check_image`, or the image is longer than the new format allows.
    """
    image = decode_rgb(data)
    too_large = resize is not None and max(image.size) > resize
    if not too_large and reencode is None:
        return data
    if too_large and resize is not None:
        least = math.ceil(resize / MAX_ASPECT_RATIO)  # rounding must not make the aspect ratio extreme
        width, height = (max(least, round(side * resize / max(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    format, _, quality = (reencode or "jpeg:95").partition(":")
    buffer = io.BytesIO()
    try:
        image.save(buffer, format.upper(), **({} if format == "png" else {"quality": int(quality or 95)}))
    except (OSError, ValueError) as error:
        raise ImageError("too long for the new format", f"{image.width} x {image.height}, {format}: {error}") from error
    return buffer.getvalue()


def _decode(data: bytes, shrink: bool = False) -> Image.Image:
    """Decode an image, for all checks; ``shrink`` reads all of a JPEG for fewer pixels."""
    try:
        return _decode_once(data, shrink)
    except ImageError:
        plain = _without_metadata(data)
        if plain != data:
            with suppress(ImageError):
                return _decode_once(plain, shrink)
        raise


def _decode_once(data: bytes, shrink: bool) -> Image.Image:
    image = _open(data)
    try:
        if shrink:
            image.draft("RGB", (1, 1))
        image.load()
        with suppress(Exception):  # an unreadable orientation is ignored
            ImageOps.exif_transpose(image, in_place=True)
        image = on_white(_eight_bits(image, data))
        if image.mode != "RGB":
            image = image.convert("RGB")
    except Exception as error:
        _refuse(data, error)
    image.info = {}
    return image


def _open(data: bytes) -> Image.Image:
    """Read the header, and refuse a bomb before any pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        _refuse(data, error)
    width, height = image.size
    size = f"{width} x {height} pixels"
    if min(width, height) < 1:
        raise ImageError("empty image", size)
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError("decompression bomb", f"{size}, at most {MAX_IMAGE_PIXELS} are accepted")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError("extreme aspect ratio", f"{size}, at most {MAX_ASPECT_RATIO} to 1 is accepted")
    return image


def _eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Convert grey of more than 8 bits to 8, where Pillow would clip it; the transparent colour follows the pixels."""
    key = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        tags = getattr(image, "tag_v2", {})
        white = _white(values, tags)
        if tags.get(_TIFF_PHOTOMETRIC) == 0:  # inverted, which Pillow handles only up to 8 bits
            values = white - values
        grey = Image.fromarray(np.multiply(values, 255 / white, dtype=np.float32).round().astype(np.uint8))
        return grey if key is None else Image.merge("LA", (grey, Image.fromarray(np.uint8(255) * (values != key))))
    if key is not None and image.format == "PNG" and image.mode in ("1", "L", "RGB"):
        depth = data[24]
        eight = [part >> 8 if depth == 16 else part * 255 // ((1 << depth) - 1) for part in np.atleast_1d(key).tolist()]
        image.info["transparency"] = tuple(eight) if image.mode == "RGB" else eight[0]
    return image


def _white(values: np.ndarray, tags: Any) -> float:
    """Return the value of white."""
    low, high = float(values.min()), float(values.max())  # nan where any value is
    bits, signed = tags.get(_TIFF_BITS, (16,))[0], tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 2
    if values.dtype.kind == "f":
        ranges = [1, 255, 65535]
    elif bits > 16:
        ranges = [255, 65535, 2**31 - 1]
    else:
        ranges = [2 ** (bits - signed) - 1]
    for white in ranges:
        if low >= 0 and high <= white:
            return white
    raise ImageError("unknown range of values", f"{low:g} to {high:g}, expected 0 to {' or '.join(map(str, ranges))}")


def on_white(image: Image.Image) -> Image.Image:
    """Return the image on white; unchanged if its transparency is invalid."""
    with suppress(Exception):
        if image.has_transparency_data:
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image.info.pop("transparency", None)
    return image


def _without_metadata(data: bytes) -> bytes:
    """Return a PNG without its optional chunks, on whose damage Pillow fails; any other image unchanged.

    Transparency and orientation stay where their chunks are sound.
    """
    if not data.startswith(_PNG) or len(data) < 26:
        return data
    kept, position = [_PNG], len(_PNG)
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        chunk = data[position : position + 12 + length]
        kind = chunk[4:8]
        sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        meant = kind == b"eXIf" or (kind == b"tRNS" and length in _PNG_KEY_BYTES.get(data[25], ()))
        if kind[:1].isupper() or (sound and meant):
            kept.append(chunk)
        position += len(chunk)
    return b"".join(kept)


def _refuse(data: bytes, error: Exception) -> NoReturn:
    """Raise an error of Pillow as an ImageError with reproducible text."""
    if isinstance(error, ImageError):
        raise error
    if not data:
        raise ImageError("empty image") from error
    if isinstance(error, Image.DecompressionBombError):
        raise ImageError("decompression bomb", str(error)) from error
    format = _format(data)
    if format is None:
        for kind, pattern, hint in _OTHER_KINDS:
            if re.match(rb"(?:\xef\xbb\xbf)?(?:%s)" % pattern, data[:8192], re.DOTALL | re.IGNORECASE):
                raise ImageError(kind, hint or f"not one of {', '.join(IMAGE_FORMATS)}") from error
        raise ImageError("undecodable image", f"not one of {', '.join(IMAGE_FORMATS)}") from error
    if isinstance(error, Image.UnidentifiedImageError):
        try:  # for the error that Image.open dropped when it went on to the next format
            Image.OPEN[format][0](io.BytesIO(data), "")
        except Exception as dropped:
            error = dropped
    message = re.sub(r" at 0x[0-9a-f]+", "", str(error))[:200] or type(error).__name__
    if "truncated" in message.lower():
        raise ImageError("truncated image", f"{format}: {message}") from error
    kind = "unsupported" if re.search("unknown|not supported|unsupported", message, re.IGNORECASE) else "damaged"
    raise ImageError(f"{kind} {format}", message) from error


def _format(data: bytes) -> str | None:
    """Return the accepted format that these bytes begin as, or None."""
    return next((format for format, magic in _MAGIC.items() if re.match(magic, data, re.DOTALL)), None)


def _structure_is_sound(data: bytes) -> bool:
    """Return whether the cheap checks suffice to accept; if not, the image has to be decoded."""
    with suppress(Exception):
        if data.startswith(b"\xff\xd8\xff"):
            _open(data)
            return data.endswith(b"\xff\xd9")  # the end marker
        if data.startswith(b"\x89PNG"):
            _open(data).verify()
            return True
        if data.startswith(b"RIFF"):
            _open(data)
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return False
