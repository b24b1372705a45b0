"""MDS data sets of a few plain images, good and bad, for tests of whole runs."""

import io
from pathlib import Path

from PIL import Image
from streaming import MDSWriter


def tile(shade: int) -> bytes:
    """Return a PNG of one shade of green."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (40, shade % 256, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tiles(out: Path, count: int, bad: tuple[int, ...] | range = (), several: bool = False) -> str:
    """Write a data set of ``count`` samples; images of those in ``bad`` do not decode.

    Args:
        out: an empty folder.
        count: samples.
        bad: numbers of bad samples.
        several: write two captions per image.
    """
    columns = {"image": "bytes", **({"captions": "json"} if several else {"caption": "str"})}
    with MDSWriter(out=str(out), columns=columns) as writer:
        for number in range(count):
            image = b"not an image" if number in bad else tile(number)
            caption = f"a tile of shade {number}"
            text = {"captions": [caption, f"shade {number} é☃"]} if several else {"caption": f"{caption} é☃"}
            writer.write({"image": image, **text})
    return str(out)
