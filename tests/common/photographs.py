"""Real photographs of odd sizes, which scikit-image brings with it."""

from pathlib import Path

import skimage
from PIL import Image

NAMES = ("chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png", "coins.png")


def photographs() -> list[Image.Image]:
    """Upright and lying, in colour and grey, each also with a row and a column less."""
    folder = Path(skimage.__file__).parent / "data"
    whole = [Image.open(folder / name).convert("RGB") for name in NAMES]
    turned = [image.transpose(Image.Transpose.ROTATE_90) for image in whole[:2]]
    cut = [image.crop((0, 0, image.width - 1, image.height - 2)) for image in whole]
    return [*whole, *turned, *cut]
