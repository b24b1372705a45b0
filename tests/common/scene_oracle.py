"""A model that reads the scene behind a picture, not the picture: what a benchmark on scenes gives a perfect model.

It knows the words of captions and where objects lie, and nothing of how true and false texts are made.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from composer_prior.emoji_scenes.captions import COUNT_WORDS, RELATIONS, plural, with_article
from composer_prior.emoji_scenes.scenes import BACKGROUNDS, CLASSES, SIZES, PlacedObject, Scene
from composer_prior.evaluation.scene_choices import SCENE
from composer_prior.models.image_text_model import TokenLogprobs

CERTAINTY = 1000.0  # nats: more than any text is less likely than another before the image is seen

_NAMES = {word: name for name in CLASSES for word in (name, plural(name))}
_NUMBERS = {"a": 1, "an": 1, **{word: number for number, word in enumerate(COUNT_WORDS, start=1)}}


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_MENTION = re.compile(rf"\b({_any([*_NUMBERS])}) (?:({_any([*SIZES])}) )?({_any([*_NAMES])})\b")
_RELATION = re.compile(rf" ({_any(RELATIONS)}) ")
_TOTAL = re.compile(rf"\b({_any(COUNT_WORDS)}) drawings?\b")
_COLOUR = re.compile(rf"\b({_any([*BACKGROUNDS])})\b")


class SceneOracle:
    """Certain of what is true of the scene in ``image.info["scene"]``; indifferent about an image without one.

    Captions are the more likely the less of what they say is false; with a prompt, texts are answers to a question.
    """

    def logprobs(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        return [
            [TokenLogprobs([_logprob(image.info.get(SCENE), text, prompt)], [(0, len(text))]) for text in some]
            for image, some in zip(images, texts, strict=True)
        ]

    def generate_captions(
        self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64
    ) -> list[str]:
        """Return a caption of the scene, or the answer to a question; an empty text for an image without a scene."""
        scenes = [image.info.get(SCENE) for image in images]
        return ["" if scene is None else _answer(prompt, scene) if prompt else _caption(scene) for scene in scenes]


def falsehoods(text: str, scene: Scene) -> list[str]:
    """What a caption, or its beginning, says that is not so.

    Raises:
        ValueError: if it says nothing about the scene.
    """
    facts = list(_facts(text, scene))
    if not facts:
        raise ValueError(f"No statement about a scene in {text!r}.")
    return [words for words, true in facts if not true]


def answers(question: str, answer: str, scene: Scene) -> bool:
    """Whether an answer to a question about the scene is right.

    Raises:
        ValueError: if the question is none of those that are known.
    """
    return answer in _answers(question, scene)


def _answers(question: str, scene: Scene) -> set[str]:
    for pattern, test in _QUESTIONS.items():
        if match := re.fullmatch(pattern, question):
            return test(scene, *match.groups())
    raise ValueError(f"Not a question about a scene: {question!r}.")


def _answer(question: str, scene: Scene) -> str:
    """Such as " Two."; what it does not see, it does not name."""
    return f" {min(_answers(question, scene), default='').capitalize()}."


def _logprob(scene: Scene | None, text: str, prompt: str | None) -> float:
    if scene is None:
        return 0.0
    false = not answers(prompt, text, scene) if prompt else len(falsehoods(text, scene))
    return -CERTAINTY * false


def _facts(text: str, scene: Scene) -> Iterator[tuple[str, bool]]:
    """Each statement of a text, and whether it is true."""
    text = text.lower()
    mentions = list(_MENTION.finditer(text))
    for mention in mentions:
        number, size, word = mention.groups()
        found = _named(scene, word)
        yield mention[0], len(found) == _NUMBERS[number] and all(size in (None, item.size) for item in found)
    for first, second in itertools.pairwise(mentions):
        if relation := _RELATION.fullmatch(text, first.end(), second.start()):
            yield relation[0].strip(), relation[1] in _positions(_named(scene, first[3]), _named(scene, second[3]))
    for total in _TOTAL.finditer(text):
        yield total[0], len(scene.objects) == _NUMBERS[total[1]]
    for colour in _COLOUR.finditer(text):
        yield colour[0], colour[0] == scene.colour


def _named(scene: Scene, word: str) -> list[PlacedObject]:
    return [item for item in scene.objects if item.name == _NAMES[word]]


def _positions(first: Sequence[PlacedObject], second: Sequence[PlacedObject]) -> set[str]:
    """On which sides of all the second objects all the first ones lie, without any overlap."""
    if not first or not second:
        return set()
    sides = {
        "left of": max(item.x + item.side for item in first) <= min(item.x for item in second),
        "right of": max(item.x + item.side for item in second) <= min(item.x for item in first),
        "above": max(item.y + item.side for item in first) <= min(item.y for item in second),
        "below": max(item.y + item.side for item in second) <= min(item.y for item in first),
    }
    return {side for side, true in sides.items() if true}


_QUESTIONS: dict[str, Callable[..., set[str]]] = {
    r"Is there an? (.+)\?": lambda scene, word: {"yes" if _named(scene, word) else "no"},
    r"How many drawings are there\?": lambda scene: {COUNT_WORDS[len(scene.objects) - 1]},
    r"How many (.+) are there\?": lambda scene, word: {("no", *COUNT_WORDS)[len(_named(scene, word))]},
    r"(?:Is|Are) the (.+) large or small\?": lambda scene, word: {item.size for item in _named(scene, word)},
    r"What colour is the background\?": lambda scene: {scene.colour},
    r"Where (?:is|are) the (.+), seen from the (.+)\?": lambda scene, first, second: {
        side.removesuffix(" of") for side in _positions(_named(scene, first), _named(scene, second))
    },
}


def _caption(scene: Scene) -> str:
    """Such as "two snails and an owl on a red background"."""
    nouns = [
        with_article(name) if len(group) == 1 else f"{COUNT_WORDS[len(group) - 1]} {plural(name)}"
        for name, group in scene.groups.items()
    ]
    return f"{' and '.join(nouns)} on {with_article(scene.colour)} background"
