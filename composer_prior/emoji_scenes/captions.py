"""Captions in the manner of alt text from the web, which know which of their characters the image determines."""

import itertools
from collections.abc import Callable, Sequence
from string import Formatter
from typing import NamedTuple

from composer_prior.emoji_scenes.scenes import PlacedObject, Rng, Scene, pick

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

Spans = list[tuple[int, int]]


class Piece(NamedTuple):
    """A stretch of a caption, and whether the image determines it."""

    text: str
    image_related: bool = False


def write_caption(scene: Scene, rng: Rng) -> tuple[str, Spans]:
    """A caption that is true of the scene and names all its objects; the [start, end) spans the image determines."""
    pieces = []
    for literal, field, _, _ in Formatter().parse(pick(TEMPLATES, rng)):
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
        relation = [Piece(" "), Piece(pick(relations, rng), True), Piece(" ")] if relations else [Piece(" and ")]
        couples.append(nouns[i] + (relation + nouns[i + 1] if i + 1 < len(groups) else []))
    return _join(couples, ", plus ")


def _total_pieces(scene: Scene, _: Rng) -> list[Piece]:
    count = len(scene.objects)
    return [Piece(COUNT_WORDS[count - 1], True), Piece(" drawing" if count == 1 else " drawings")]


def _boilerplate(options: Sequence[str]) -> Callable[[Scene, Rng], list[Piece]]:
    return lambda _, rng: [Piece(pick(options, rng))]


_FIELDS: dict[str, Callable[[Scene, Rng], list[Piece]]] = {
    "scene": _scene_pieces,
    "total": _total_pieces,
    "colour": lambda scene, _: [Piece(scene.colour, True)],
    "a_colour": lambda scene, _: [Piece(f"{_article(scene.colour)} "), Piece(scene.colour, True)],
    "lead": _boilerplate(LEADS),
    "tail": _boilerplate(TAILS),
    "person": lambda _, rng: [Piece(f"{pick(FIRST_NAMES, rng)} {pick(LAST_NAMES, rng)}")],
    "date": lambda _, rng: [Piece(f"{rng.integers(1, 29)} {pick(MONTHS, rng)} {rng.integers(2004, 2025)}")],
    "number": lambda _, rng: [Piece(str(rng.integers(100_000, 1_000_000)))],
}
