"""Captions in the style of alt text from the web, with the spans of characters that the image determines."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from string import Formatter
from typing import Any, Literal, NamedTuple

from composer_prior.emoji_scenes.scenes import PlacedObject, Rng, Scene, pick

COUNT_WORDS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
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
# The same without names, dates and numbers, which nothing foretells.
PLAIN_TEMPLATES = (
    "{lead}: {scene} on {a_colour} background",
    "{lead}: {scene}, {tail}",
    "{lead}: {total}, {scene}, on plain {colour} paper, {tail}",
    "{scene} isolated on plain {colour} background, {tail}",
    "{scene} on {a_colour} background | {tail}",
    "{scene}, {colour} background, vector clip art, {tail}",
    "Image of {scene} against {a_colour} backdrop",
    "Via web gallery: {scene}, {colour} backdrop",
    "{tail}: poster with {scene} on {colour} canvas",
    "{colour} wallpaper with {scene}, {tail}",
    "Photo: {total} on {a_colour} page, {scene}",
    "{total} with {scene}, {tail}",
)
Clutter = Literal["none", "some", "full"]
_BY_CLUTTER = {"none": PLAIN_TEMPLATES, "some": TEMPLATES + PLAIN_TEMPLATES, "full": TEMPLATES}
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
    """A piece of a caption; the image determines it or not."""

    text: str
    image_related: bool = False


@dataclass(frozen=True)
class Mention:
    """All objects of one class; the size is optional."""

    name: str
    count: int
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """The content of a caption: objects in order, and the colour of the background.

    A relation joins the first mention to the second, or the third to the fourth; None leaves them unrelated. A plain
    list of mentions has no relations.
    """

    mentions: tuple[Mention, ...]
    relations: tuple[str | None, ...]
    colour: str

    def change(self, place: int, **facts: Any) -> "Description":
        """Return a copy with other facts in the mention at `place`."""
        mentions = list(self.mentions)
        mentions[place] = replace(mentions[place], **facts)
        return replace(self, mentions=tuple(mentions))


def templates_of(clutter: Clutter) -> tuple[str, ...]:
    """Return the templates of captions: all without names, dates and numbers, about half, or one of twelve.

    Raises:
        ValueError: for another value.
    """
    if clutter not in _BY_CLUTTER:
        raise ValueError(f"clutter={clutter!r}: expected none, some or full.")
    return _BY_CLUTTER[clutter]


def write_caption(scene: Scene, rng: Rng, clutter: Clutter = "full") -> tuple[str, Spans]:
    """Write a true caption that names all objects; return it with the [start, end) spans that the image determines."""
    return _fill(pick(templates_of(clutter), rng), cache(lambda: describe(scene, rng)), rng)


def write_description(description: Description, template: str, rng: Rng) -> tuple[str, Spans]:
    """Write a description in the words of a template, and return it with the spans that the image determines."""
    return _fill(template, lambda: description, rng)


def describe(scene: Scene, rng: Rng, *, sized: bool | None = None, related: bool | None = None) -> Description:
    """Describe every class with its count, in random order.

    Args:
        scene: the scene.
        rng: source of random numbers.
        sized: mention sizes. Default: drawn.
        related: mention relations that hold. Default: drawn.
    """
    groups = list(scene.groups.values())
    groups = [groups[i] for i in rng.permutation(len(groups))]
    draws = rng.random(2) < (0.6, 0.75)
    says_size, says_relation = (draws[0] if sized is None else sized), (draws[1] if related is None else related)
    relations: list[str | None] = []
    for first, second in zip(groups[::2], groups[1::2], strict=False) if says_relation else ():
        true = true_relations(first, second)
        relations.append(pick(true, rng) if true else None)
    mentions = [Mention(group[0].name, len(group), group[0].size if says_size else None) for group in groups]
    return Description(tuple(mentions), tuple(relations), scene.colour)


def true_relations(first: Sequence[PlacedObject], second: Sequence[PlacedObject]) -> list[str]:
    """Return the relations that hold between every object of `first` and every object of `second`."""
    holds = (
        max(a.right for a in first) <= min(b.x for b in second),
        max(b.right for b in second) <= min(a.x for a in first),
        max(a.bottom for a in first) <= min(b.y for b in second),
        max(b.bottom for b in second) <= min(a.y for a in first),
    )
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


def plural(name: str) -> str:
    """Return the plural of a class's name."""
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


def with_article(name: str) -> str:
    """Return a name with its article, such as "a snail" or "an owl"."""
    return f"{_article(name)} {name}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"


def _join(parts: Sequence[list[Piece]], separator: str, last_separator: str | None = None) -> list[Piece]:
    """Join parts by a separator, with an optional other separator before the last."""
    pieces = list(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        pieces += [Piece(last_separator if last_separator and i == len(parts) else separator), *part]
    return pieces


def _fill(template: str, description: Callable[[], Description], rng: Rng) -> tuple[str, Spans]:
    """Fill the fields of a template from left to right; the description is computed when needed."""
    pieces = []
    for literal, field, _, _ in Formatter().parse(template):
        pieces.append(Piece(literal))
        if field in _DESCRIBED:
            pieces += _DESCRIBED[field](description())
        elif field:
            pieces.append(Piece(_BOILERPLATE[field](rng)))
    caption = "".join(piece.text for piece in pieces)
    ends = list(itertools.accumulate(len(piece.text) for piece in pieces))
    spans = [(end - len(piece.text), end) for piece, end in zip(pieces, ends, strict=True) if piece.image_related]
    return caption[0].upper() + caption[1:], spans


def _noun_phrase(mention: Mention) -> list[Piece]:
    """Return a phrase such as "a small snail" or "two umbrellas"."""
    words = [mention.size] if mention.size else []
    words.append(mention.name if mention.count == 1 else plural(mention.name))
    quantity = Piece(_article(words[0])) if mention.count == 1 else Piece(COUNT_WORDS[mention.count - 1], True)
    return _join([[quantity], *([Piece(word, True)] for word in words)], " ")


def _scene_pieces(description: Description) -> list[Piece]:
    nouns = [_noun_phrase(mention) for mention in description.mentions]
    if not description.relations:
        return _join(nouns, ", ", " and ")
    couples = []
    for first, second, relation in itertools.zip_longest(nouns[::2], nouns[1::2], description.relations):
        link = [Piece(" "), Piece(relation, True), Piece(" ")] if relation else [Piece(" and ")]
        couples.append([*first, *link, *second] if second else first)
    return _join(couples, ", plus ")


def _total_pieces(description: Description) -> list[Piece]:
    count = sum(mention.count for mention in description.mentions)
    return [Piece(COUNT_WORDS[count - 1], True), Piece(" drawing" if count == 1 else " drawings")]


_DESCRIBED: dict[str, Callable[[Description], list[Piece]]] = {
    "scene": _scene_pieces,
    "total": _total_pieces,
    "colour": lambda description: [Piece(description.colour, True)],
    "a_colour": lambda description: [Piece(f"{_article(description.colour)} "), Piece(description.colour, True)],
}
_BOILERPLATE: dict[str, Callable[[Rng], str]] = {
    "lead": lambda rng: pick(LEADS, rng),
    "tail": lambda rng: pick(TAILS, rng),
    "person": lambda rng: f"{pick(FIRST_NAMES, rng)} {pick(LAST_NAMES, rng)}",
    "date": lambda rng: f"{rng.integers(1, 29)} {pick(MONTHS, rng)} {rng.integers(2004, 2025)}",
    "number": lambda rng: str(rng.integers(100_000, 1_000_000)),
}
