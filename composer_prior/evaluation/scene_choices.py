"""What benchmarks on emoji scenes share: items that are made when they are asked for, as many of each category."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from composer_prior.emoji_scenes.drawings import check_drawings, versions
from composer_prior.emoji_scenes.scenes import CLASSES, draw_scene
from composer_prior.emoji_scenes.statements import Statements
from composer_prior.evaluation.choices import Choice, ChoiceBenchmark
from composer_prior.models.reference import ReferenceLM
from composer_prior.registry import did_you_mean

SCENE = "scene"  # the key of an image's `info` that holds its scene


class SceneChoices(ChoiceBenchmark):
    """Choices among texts about emoji scenes, none of which training shows: all are held-out combinations.

    Args:
        samples: how many; categories take turns.
        canvas: side of the images in pixels, at least 32, such as that of the training data.
        seed: of the training data, which decides what is held out.
        categories: some of those that its figures name. Default: all.
        reference: blank, for the model itself with a grey image, or a causal LM on text, such as PRIOR's reference.

    Raises:
        ImportError: the packages of the `emoji` extra are missing.
        ValueError: an impossible argument.
    """

    all_categories: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        samples: int = 1000,
        canvas: int = 96,
        seed: int = 17,
        categories: list[str] | None = None,
        reference: str | ReferenceLM = "blank",
    ):
        self.check(samples, canvas, seed, categories)
        check_drawings(CLASSES)
        super().__init__(reference)
        self.samples, self.canvas, self.seed = samples, canvas, seed
        self.categories = tuple(categories or self.all_categories)
        made_from = {"samples": samples, "canvas": canvas, "seed": seed, "categories": self.categories, **versions()}
        self.fingerprint = f"{type(self).__name__} {json.dumps(made_from)}"
        self._choice = lru_cache(maxsize=4096)(self._make_choice)

    @classmethod
    def check(cls, samples: int = 1, canvas: int = 96, seed: int = 17, categories: Sequence[str] | None = None) -> None:
        """Refuse impossible arguments."""
        for key, value, least in (("samples", samples, 1), ("canvas", canvas, 32), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{key} must be at least {least}, got {value}.")
        for category in categories or ():
            if category not in cls.all_categories:
                raise ValueError(f"{category!r} is not a category. {did_you_mean(category, cls.all_categories)}")

    def __len__(self) -> int:
        return self.samples

    @abstractmethod
    def statements(self, category: str, index: int) -> Statements:
        """The texts of an item of a category."""

    def choice(self, number: int) -> Choice:
        return self._choice(number)

    def _make_choice(self, number: int) -> Choice:
        index, turn = divmod(number, len(self.categories))
        category = self.categories[turn]
        item = self.statements(category, index)
        image = draw_scene(item.scene)
        image.info[SCENE] = item.scene
        return Choice(image, item.texts, category, item.prompt)
