"""Texts about a scene of which one is true, made so that nothing but the image tells which.

Every scene is of the validation split: its combination of classes, or of class and colour, is one that training never
shows. So is that of every foil, so that a model that remembers combinations gains nothing either. Which of the
possible answers is true is drawn last, each equally often.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from composer_prior.emoji_scenes.captions import Description, write_description
from composer_prior.emoji_scenes.scenes import Rng, Scene, is_held_out, pick, sample_scene


@dataclass(frozen=True)
class Statements:
    """Texts about a scene.

    Args:
        scene: what they are about.
        texts: the first one is true, the others are not.
        prompt: what they answer; None: nothing, they are captions or beginnings of captions.
    """

    scene: Scene
    texts: tuple[str, ...]
    prompt: str | None = None


@dataclass(frozen=True)
class Source:
    """Where the scenes of one item come from.

    Args:
        rng: the random numbers of the item.
        canvas: side of the images in pixels.
        seed: of the training data, which decides what is held out.
    """

    rng: Rng
    canvas: int
    seed: int

    def scene(self, counts: Sequence[int] | None = None) -> Scene:
        """A scene that training never shows."""
        return sample_scene("validation", self.rng, canvas=self.canvas, seed=self.seed, counts=counts)

    def is_new(self, names: Sequence[str], colour: str) -> bool:
        """Whether training never shows this."""
        return is_held_out(names, colour, self.seed)


def item_rng(purpose: str, index: int, seed: int) -> Rng:
    """The random numbers of one item."""
    return Rng(np.random.PCG64([seed, index, int.from_bytes(purpose.encode(), "big")]))


def true_answer(purpose: str, index: int, answers: int, seed: int) -> int:
    """Which answer of item `index` is true: each once in every `answers` items, in an order that is drawn."""
    order = item_rng(f"{purpose}/order", index // answers, seed).permutation(answers)
    return int(order[index % answers])


def keep_first(scene: Scene, name: str, count: int) -> Scene:
    """The scene without the objects of a class that come after the first `count`."""
    dropped = scene.groups[name][count:]
    return replace(scene, objects=tuple(item for item in scene.objects if item not in dropped))


def write_all(descriptions: Sequence[Description], templates: Sequence[str], rng: Rng) -> tuple[str, ...]:
    """The descriptions in the same words, those of a template that is drawn."""
    template, wording = pick(templates, rng), int(rng.integers(2**63))
    return tuple(write_description(one, template, Rng(np.random.PCG64(wording)))[0] for one in descriptions)
