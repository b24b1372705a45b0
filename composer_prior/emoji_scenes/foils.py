"""Captions of a scene with exactly one wrong fact, in the words of the training captions."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from composer_prior.emoji_scenes.captions import RELATIONS, Clutter, Description, describe, templates_of
from composer_prior.emoji_scenes.scenes import BACKGROUNDS, CLASSES, SIZES, Scene
from composer_prior.emoji_scenes.statements import Source, Statements, draw, keep_first, write_all

FOILS = 3  # of a class or a colour; counts, sizes, relations and absences have one
COUNT_PAIRS = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))

_Found = tuple[Scene, Sequence[Description]] | None  # the true description first; None: the scene does not suit


def make_foils(category: str, index: int, *, canvas: int = 96, seed: int = 17, clutter: Clutter = "full") -> Statements:
    """Make a true caption of a scene and its foils, which differ from it in one fact.

    - ``class``: an object has the name of another class, which is not in the scene. Three foils.
    - ``count``: there are more or fewer of a class. One foil.
    - ``size``: the objects of a class are small, not large, or the other way round. One foil.
    - ``colour``: of the background. Three foils.
    - ``relation``: the opposite of the true one. One foil.
    - ``absence``: the caption names one more class, which is absent, or omits one; the total changes too. One foil.

    Args:
        category: the wrong fact, one of ``CATEGORIES``.
        index: number of the item; ``(seed, category, index)`` determine it.
        canvas: side of the image in pixels, at least 32.
        seed: seed of the training data, which determines the held-out combinations.
        clutter: of the training data, see :func:`.make_emoji_scenes`.
    """
    find, answers, word = _CATEGORIES[category]
    (scene, descriptions), rng = draw(find, f"foils/{category}", index, answers, canvas, seed)
    templates = [template for template in templates_of(clutter) if word in template]
    return Statements(scene, write_all(descriptions, templates, rng))


def _class(source: Source, _: int) -> _Found:
    scene = source.scene()
    description = describe(scene, source.rng)
    place = int(source.rng.integers(len(description.mentions)))
    named = [mention.name for mention in description.mentions]
    kept = named[:place] + named[place + 1 :]
    others = [name for name in CLASSES if name not in named and source.allows([*kept, name], scene.colour)]
    if len(others) < FOILS:
        return None
    names = source.rng.choice(others, FOILS, replace=False)
    return scene, [description, *(description.change(place, name=str(name)) for name in names)]


def _count(source: Source, answer: int) -> _Found:
    low, high = COUNT_PAIRS[source.rng.integers(len(COUNT_PAIRS))]
    further = int(source.rng.integers(4 - high + 1))
    scene = source.scene([high] + [1] * further)
    description = describe(scene, source.rng)
    name = scene.objects[0].name
    place = [mention.name for mention in description.mentions].index(name)
    pair = [description, description.change(place, count=low)]
    return (scene, pair) if answer else (keep_first(scene, name, low), pair[::-1])


def _size(source: Source, answer: int) -> _Found:
    scene = source.scene()
    description = describe(scene, source.rng, sized=True)
    place = int(source.rng.integers(len(description.mentions)))
    true, false = tuple(SIZES)[answer], tuple(SIZES)[1 - answer]
    if description.mentions[place].size != true:
        return None
    return scene, [description, description.change(place, size=false)]


def _colour(source: Source, answer: int) -> _Found:
    scene = source.scene()
    if scene.colour != tuple(BACKGROUNDS)[answer] or len(scene.groups) == 1:  # of a lone class the colour is held out
        return None
    description = describe(scene, source.rng)
    others = [colour for colour in BACKGROUNDS if colour != scene.colour]
    colours = source.rng.choice(others, FOILS, replace=False)
    return scene, [description, *(replace(description, colour=str(colour)) for colour in colours)]


def _relation(source: Source, answer: int) -> _Found:
    scene = source.scene()
    description = describe(scene, source.rng, related=True)
    true, false = RELATIONS[answer], RELATIONS[answer ^ 1]
    if true not in description.relations:
        return None
    place = description.relations.index(true)
    relations = (*description.relations[:place], false, *description.relations[place + 1 :])
    return scene, [description, replace(description, relations=relations)]


def _absence(source: Source, answer: int) -> _Found:
    scene = source.scene()
    description = describe(scene, source.rng, related=False)
    place = int(source.rng.integers(len(description.mentions)))
    fewer = description.mentions[:place] + description.mentions[place + 1 :]
    if not fewer or not source.allows([mention.name for mention in fewer], scene.colour):
        return None
    pair = [description, replace(description, mentions=fewer)]
    if answer:
        return scene, pair
    return keep_first(scene, description.mentions[place].name, 0), pair[::-1]


_CATEGORIES: dict[str, tuple[Callable[[Source, int], _Found], int, str]] = {  # the text is in a caption's template
    "class": (_class, 1, ""),
    "count": (_count, 2, ""),
    "size": (_size, len(SIZES), ""),
    "colour": (_colour, len(BACKGROUNDS), "colour}"),
    "relation": (_relation, len(RELATIONS), ""),
    "absence": (_absence, 2, "{total}"),
}
CATEGORIES = tuple(_CATEGORIES)
