"""Questions about a scene with possible answers, also as beginnings of captions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from composer_prior.emoji_scenes.captions import (
    COUNT_WORDS,
    RELATIONS,
    Description,
    Mention,
    describe,
    plural,
    true_relations,
    with_article,
)
from composer_prior.emoji_scenes.scenes import BACKGROUNDS, CLASSES, SIZES, PlacedObject, Scene, pick
from composer_prior.emoji_scenes.statements import Source, Statements, draw, write_all

Form = Literal["cloze", "question"]

# The scene, the question, its answers and what a caption would say for each; the true ones first.
_Found = tuple[Scene, str, Sequence[str], Sequence[Description]] | None


def make_question(
    category: str, index: int, *, form: Form = "cloze", canvas: int = 96, seed: int = 17, split: str = "validation"
) -> Statements:
    """Make a question about a scene, its true answer and the false ones.

    Models trained on captions alone do not answer questions. For them ``cloze`` uses beginnings of captions that end
    with the answer ("Stock photo: two snails"); score these without the end of the text. ``question`` is a prompt with
    short answers, for instruction-tuned models.

    - ``presence``: "Is there a snail?" yes or no. Captions contain no negation, so the cloze names a present or an
      absent class.
    - ``count``: "How many snails are there?" one to four.
    - ``size``: "Is the snail large or small?"
    - ``colour``: "What colour is the background?" eight colours.
    - ``position``: "Where is the snail, seen from the owl?" left, right, above or below; exactly one holds.
    - ``total``: "How many drawings are there?" one to four; there is no cloze of it.

    Args:
        category: topic of the question, one of ``CATEGORIES``; of a cloze, one of ``CLOZES``.
        index: number of the item; ``(seed, category, index)`` determine its scene.
        form: ``cloze`` or ``question``.
        canvas: side of the image in pixels, at least 32.
        seed: seed of the training data, which determines the held-out combinations.
        split: ``train`` asks about scenes of other combinations, to train on.
    """
    find, answers, beginning = _CATEGORIES[category]
    purpose = f"questions/{category}" if split == "validation" else f"{split} questions/{category}"
    (scene, question, options, descriptions), rng = draw(find, purpose, index, answers, canvas, seed, split)
    if form == "question":
        return Statements(scene, tuple(options), question)
    assert beginning is not None
    return Statements(scene, write_all(descriptions, [beginning], rng))


def _presence(source: Source, answer: int) -> _Found:
    scene = source.scene()
    group = _any_group(scene, source)
    name, kept = group[0].name, [other for other in scene.groups if other != group[0].name]
    others = [other for other in CLASSES if other not in scene.groups and source.allows([*kept, other], scene.colour)]
    if not others:
        return None
    absent = pick(others, source.rng)
    question = f"Is there {with_article(absent if answer else name)}?"
    descriptions = [_description(scene, Mention(one, len(group))) for one in (name, absent)]
    return scene, question, _first(("yes", "no"), answer), descriptions


def _count(source: Source, answer: int) -> _Found:
    further = int(source.rng.integers(len(COUNT_WORDS) - answer))
    scene = source.scene([answer + 1] + [1] * further)
    name = scene.objects[0].name
    descriptions = [_description(scene, Mention(name, count)) for count in range(1, len(COUNT_WORDS) + 1)]
    return scene, f"How many {plural(name)} are there?", _first(COUNT_WORDS, answer), _first(descriptions, answer)


def _size(source: Source, answer: int) -> _Found:
    scene = source.scene()
    group = _any_group(scene, source)
    sizes = _first(tuple(SIZES), answer)
    if group[0].size != sizes[0]:
        return None
    descriptions = [_description(scene, Mention(group[0].name, len(group), size)) for size in sizes]
    verb, noun = _named(group)
    return scene, f"{verb.capitalize()} {noun} large or small?", sizes, descriptions


def _colour(source: Source, answer: int) -> _Found:
    scene = source.scene()
    colours = _first(tuple(BACKGROUNDS), answer)
    if scene.colour != colours[0] or len(scene.groups) == 1:  # of a lone class the colour is held out
        return None
    description = describe(scene, source.rng)
    descriptions = [replace(description, colour=colour) for colour in colours]
    return scene, "What colour is the background?", colours, descriptions


def _position(source: Source, answer: int) -> _Found:
    scene = source.scene()
    groups = list(scene.groups.values())
    if len(groups) == 1:
        return None
    first, second = (groups[i] for i in source.rng.choice(len(groups), 2, replace=False))
    relations = _first(RELATIONS, answer)
    if true_relations(first, second) != [relations[0]]:
        return None
    mentions = [Mention(group[0].name, len(group)) for group in (first, second)]
    descriptions = [_description(scene, *mentions, relations=(relation,)) for relation in relations]
    (verb, noun), (_, other) = _named(first), _named(second)
    question = f"Where {verb} {noun}, seen from {other}?"
    return scene, question, [relation.removesuffix(" of") for relation in relations], descriptions


def _total(source: Source, answer: int) -> _Found:
    scene = source.scene()
    if len(scene.objects) != answer + 1:
        return None
    return scene, "How many drawings are there?", _first(COUNT_WORDS, answer), ()


def _any_group(scene: Scene, source: Source) -> list[PlacedObject]:
    groups = list(scene.groups.values())
    return groups[source.rng.integers(len(groups))]


def _description(scene: Scene, *mentions: Mention, relations: tuple[str | None, ...] = ()) -> Description:
    return Description(mentions, relations, scene.colour)


def _first(options: Sequence[Any], answer: int) -> list[Any]:
    """Return the options with the one at `answer` first."""
    return [options[answer], *options[:answer], *options[answer + 1 :]]


def _named(group: Sequence[PlacedObject]) -> tuple[str, str]:
    """Return the verb and the noun of a class, such as "are" and "the snails"."""
    return ("is", f"the {group[0].name}") if len(group) == 1 else ("are", f"the {plural(group[0].name)}")


_CATEGORIES: dict[str, tuple[Callable[[Source, int], _Found], int, str | None]] = {
    "presence": (_presence, 2, "{lead}: {scene}"),
    "count": (_count, len(COUNT_WORDS), "{lead}: {scene}"),
    "size": (_size, len(SIZES), "{lead}: {scene}"),
    "colour": (_colour, len(BACKGROUNDS), "{lead}: {scene} on {a_colour} background"),
    "position": (_position, len(RELATIONS), "{lead}: {scene}"),
    "total": (_total, len(COUNT_WORDS), None),
}
CATEGORIES = tuple(_CATEGORIES)
CLOZES = tuple(category for category, (_, _, beginning) in _CATEGORIES.items() if beginning is not None)
