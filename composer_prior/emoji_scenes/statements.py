"""Texts about a scene, one of them true, which only the image distinguishes.

Unless told otherwise, scenes are of the validation split: their combinations of classes, or of class and colour, are
held out of training. So is the combination of every foil, so that memorized combinations do not help. The true answer
is drawn last, and each answer is true equally often.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from composer_prior.emoji_scenes.captions import Description, write_description
from composer_prior.emoji_scenes.scenes import Rng, Scene, is_held_out, pick, sample_scene

T = TypeVar("T")


@dataclass(frozen=True)
class Statements:
    """Texts about a scene, of which only the first is true.

    They answer the question ``prompt``; without one they are captions or the beginnings of captions.
    """

    scene: Scene
    texts: tuple[str, ...]
    prompt: str | None = None


@dataclass(frozen=True)
class Source:
    """Source of the scenes of one item; the seed of the training data determines the held-out combinations."""

    rng: Rng
    canvas: int
    seed: int
    split: str

    def scene(self, counts: Sequence[int] | None = None) -> Scene:
        """Sample a scene of the split."""
        return sample_scene(self.split, self.rng, canvas=self.canvas, seed=self.seed, counts=counts)

    def allows(self, names: Sequence[str], colour: str) -> bool:
        """Return True if the combination is one of the split."""
        return is_held_out(names, colour, self.seed) == (self.split == "validation")


def _item_rng(purpose: str, index: int, seed: int) -> Rng:
    return Rng(np.random.PCG64([seed, index, int.from_bytes(purpose.encode(), "big")]))


def draw(
    find: Callable[[Source, int], T | None],
    purpose: str,
    index: int,
    answers: int,
    canvas: int,
    seed: int,
    split: str = "validation",
) -> tuple[T, Rng]:
    """Draw scenes until one suits the item's true answer; return it and the item's random numbers.

    Each answer is true once in every `answers` items, in random order.
    """
    source = Source(_item_rng(purpose, index, seed), canvas, seed, split)
    order = _item_rng(f"{purpose}/order", index // answers, seed).permutation(answers)
    while (found := find(source, int(order[index % answers]))) is None:
        pass
    return found, source.rng


def keep_first(scene: Scene, name: str, count: int) -> Scene:
    """Return the scene with only the first `count` objects of a class."""
    dropped = scene.groups[name][count:]
    return replace(scene, objects=tuple(item for item in scene.objects if item not in dropped))


def write_all(descriptions: Sequence[Description], templates: Sequence[str], rng: Rng) -> tuple[str, ...]:
    """Write the descriptions in the same words, with a random template."""
    template, wording = pick(templates, rng), int(rng.integers(2**63))
    return tuple(write_description(one, template, Rng(np.random.PCG64(wording)))[0] for one in descriptions)
