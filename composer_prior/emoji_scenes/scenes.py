"""Scenes: drawings on a coloured canvas."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from composer_prior.emoji_scenes.drawings import drawing

SPLITS = ("train", "validation")

# CLDR short names whose drawings are told apart at 26 pixels, and whose singular and plural read naturally.
CLASSES = (
    *("bat", "butterfly", "camel", "cat", "cow", "crab", "crocodile", "deer", "dragon", "duck", "elephant", "fish"),
    *("flamingo", "fox", "frog", "giraffe", "gorilla", "hedgehog", "honeybee", "jellyfish", "koala", "lady beetle"),
    *("lion", "monkey", "mouse", "octopus", "owl", "panda", "parrot", "penguin", "rabbit", "rooster", "shark"),
    *("snail", "snake", "spider", "swan", "tiger", "turtle", "unicorn", "whale", "wolf", "zebra"),
    *("avocado", "banana", "birthday cake", "candy", "carrot", "cookie", "croissant", "cupcake", "doughnut", "egg"),
    *("eggplant", "hamburger", "hot dog", "lemon", "lollipop", "mushroom", "onion", "peach", "pear", "pineapple"),
    *("pizza", "pretzel", "strawberry", "taco", "tomato", "watermelon"),
    *("cactus", "cloud", "crescent moon", "evergreen tree", "maple leaf", "palm tree", "rainbow", "rose"),
    *("snowflake", "snowman", "star", "sunflower", "volcano"),
    *("airplane", "alarm clock", "anchor", "axe", "backpack", "balloon", "basketball", "bell", "bicycle", "broom"),
    *("bucket", "bus", "camera", "candle", "castle", "chair", "crown", "drum", "envelope", "guitar", "hammer"),
    *("helicopter", "house", "key", "kite", "ladder", "light bulb", "magnet", "microscope", "robot", "rocket"),
    *("sailboat", "skull", "soccer ball", "teapot", "teddy bear", "telephone", "television", "tent", "top hat"),
    *("tractor", "train", "trophy", "trumpet", "umbrella", "wine glass", "wrapped gift"),
)
# Light enough for OpenMoji's black outlines, and far apart even after the jitter of brightness.
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (158, 158, 158),
    "red": (226, 84, 76),
    "yellow": (248, 222, 90),
    "green": (104, 188, 108),
    "blue": (92, 148, 226),
    "purple": (154, 104, 200),
    "pink": (246, 172, 206),
}
BRIGHTNESS = (0.94, 1.04)
SIZES = {"large": 0.44, "small": 0.27}  # of the canvas; at most half, so that an object fits in its cell of the grid
OBJECT_COUNTS = (0.25, 0.35, 0.25, 0.15)  # probability of 1, 2, 3, 4 objects
REPEAT_CLASS = 0.35  # probability that a further object is one more of a class already there
HELD_OUT_PERCENT = 10


Rng = np.random.Generator


@dataclass(frozen=True)
class PlacedObject:
    """One drawing, centred in the square of `side` pixels whose top left corner is at (`x`, `y`)."""

    name: str
    size: str
    x: int
    y: int
    side: int

    @property
    def right(self) -> int:
        """Right edge in pixels."""
        return self.x + self.side

    @property
    def bottom(self) -> int:
        """Lower edge in pixels."""
        return self.y + self.side


@dataclass(frozen=True)
class Scene:
    """The content of an image; objects of one class have one size."""

    canvas: int
    colour: str
    rgb: tuple[int, int, int]
    objects: tuple[PlacedObject, ...]

    @property
    def groups(self) -> dict[str, list[PlacedObject]]:
        """The objects of each class."""
        return {
            name: [item for item in self.objects if item.name == name]
            for name in dict.fromkeys(item.name for item in self.objects)
        }


def sample_rng(split: str, index: int, seed: int) -> Rng:
    """Return the random numbers of one sample."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index])))


def is_held_out(names: Sequence[str], colour: str, seed: int) -> bool:
    """Return True if a pair of classes or, for a single class, the class on that colour is held out of training."""
    classes = sorted(set(names))
    pairs = itertools.combinations(classes, 2) if len(classes) > 1 else [(classes[0], colour)]
    digests = (hashlib.blake2b(f"{seed}/{first}/{second}".encode(), digest_size=8) for first, second in pairs)
    return any(int.from_bytes(one.digest(), "big") % 100 < HELD_OUT_PERCENT for one in digests)


def sample_scene(
    split: str, rng: Rng, *, canvas: int = 96, seed: int = 17, counts: Sequence[int] | None = None
) -> Scene:
    """Sample a scene of `split`, with these counts of objects by class, or random ones."""
    counts = counts or _sample_counts(rng)
    names, colour = _sample_combination(split, len(counts), rng, seed)
    sizes = [pick(tuple(SIZES), rng) for _ in names]
    labels = [(name, size) for name, size, count in zip(names, sizes, counts, strict=True) for _ in range(count)]
    brightness = rng.uniform(*BRIGHTNESS)
    red, green, blue = (min(255, round(channel * brightness)) for channel in BACKGROUNDS[colour])
    return Scene(canvas, colour, (red, green, blue), tuple(_place(labels, rng, canvas)))


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene."""
    image = Image.new("RGB", (scene.canvas, scene.canvas), scene.rgb)
    for item in scene.objects:
        picture = drawing(item.name, item.side)
        corner = (item.x + (item.side - picture.width) // 2, item.y + (item.side - picture.height) // 2)
        image.paste(picture, corner, picture)
    return image


def pick(options: Sequence[str], rng: Rng) -> str:
    """Draw one of the options."""
    return options[rng.integers(len(options))]


def _sample_counts(rng: Rng) -> list[int]:
    """Draw the number of objects of each class."""
    counts = [1]
    for _ in range(rng.choice(len(OBJECT_COUNTS), p=OBJECT_COUNTS)):
        if rng.random() < REPEAT_CLASS:
            counts[rng.integers(len(counts))] += 1
        else:
            counts.append(1)
    return counts


def _sample_combination(split: str, classes: int, rng: Rng, seed: int) -> tuple[list[str], str]:
    """Draw class names and a colour until they belong to `split`."""
    while True:
        names = [CLASSES[i] for i in rng.choice(len(CLASSES), classes, replace=False)]
        colour = pick(tuple(BACKGROUNDS), rng)
        if is_held_out(names, colour, seed) == (split == "validation"):
            return names, colour


def _place(labels: Sequence[tuple[str, str]], rng: Rng, canvas: int) -> Iterator[PlacedObject]:
    """Put each (name, size) into a different cell of the 2x2 grid, and a single one anywhere."""
    cell = canvas if len(labels) == 1 else canvas // 2
    for (name, size), place in zip(labels, rng.permutation(4), strict=False):
        side = int(SIZES[size] * canvas)
        row, column = divmod(int(place), 2) if len(labels) > 1 else (0, 0)
        x, y = (int(offset) for offset in rng.integers(1, cell - side, size=2))  # a pixel from every edge
        yield PlacedObject(name, size, column * cell + x, row * cell + y, side)
