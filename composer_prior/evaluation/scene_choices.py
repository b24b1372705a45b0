"""Choices between texts about emoji scenes, which are made when they are asked for, as many of each category."""

import json
from abc import abstractmethod
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from composer_prior.emoji_scenes import foils, questions
from composer_prior.emoji_scenes.captions import Clutter, templates_of
from composer_prior.emoji_scenes.drawings import check_drawings, versions
from composer_prior.emoji_scenes.scenes import CLASSES, draw_scene
from composer_prior.emoji_scenes.statements import Statements
from composer_prior.evaluation.choices import Choice, ChoiceBenchmark
from composer_prior.models.reference import ReferenceLM
from composer_prior.registry import Count, Whole, check_value, did_you_mean

Side = Annotated[int, "of at least 32"]
SCENE = "scene"  # the key of an image's `info` that holds its scene


class SceneChoices(ChoiceBenchmark):
    """Choices among texts about emoji scenes of held-out combinations, which training never shows.

    Args:
        samples: how many; categories take turns.
        canvas: side of the images in pixels, such as that of the training data.
        seed: of the training data, which decides what is held out.
        categories: some of those that its figures name. Default: all.
        reference: blank, for the model itself with a grey image, or a causal LM on text, such as PRIOR's reference.
    """

    all_categories: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        samples: Count = 1000,
        canvas: Side = 96,
        seed: Whole = 17,
        categories: list[str] | None = None,
        reference: str | ReferenceLM = "blank",
    ):
        check_value("samples", samples, Count)
        check_value("canvas", canvas, Side)
        check_value("seed", seed, Whole)
        for category in categories or ():
            if category not in self.all_categories:
                raise ValueError(f"{category!r} is not a category. {did_you_mean(category, self.all_categories)}")
        check_drawings(CLASSES)
        super().__init__(reference)
        self.samples, self.canvas, self.seed = samples, canvas, seed
        self.categories = tuple(categories or self.all_categories)
        made_from = {"samples": samples, "canvas": canvas, "seed": seed, "categories": self.categories, **versions()}
        self.fingerprint = f"{type(self).__name__} {json.dumps(made_from)}"
        self._choice = lru_cache(maxsize=4096)(self._make_choice)

    def __len__(self) -> int:
        return self.samples

    @abstractmethod
    def statements(self, category: str, index: int) -> Statements:
        """Make the texts of an item of a category."""

    def choice(self, number: int) -> Choice:
        return self._choice(number)

    def _make_choice(self, number: int) -> Choice:
        index, turn = divmod(number, len(self.categories))
        category = self.categories[turn]
        item = self.statements(category, index)
        image = draw_scene(item.scene)
        image.info[SCENE] = item.scene
        return Choice(image, item.texts, category, item.prompt)


class SceneFoils(SceneChoices):
    """Choices between a true caption and captions with one wrong fact, see :func:`.make_foils`.

    Args:
        clutter: of the training data, see :func:`.make_emoji_scenes`. Default: ``"full"``.
        others: those of :class:`.SceneChoices`.
    """

    all_categories = foils.CATEGORIES

    def __init__(self, clutter: Clutter = "full", **others: Any):
        super().__init__(**others)
        templates_of(clutter)  # or refuse it
        self.clutter: Clutter = clutter
        self.fingerprint += "" if clutter == "full" else f" {clutter}"

    def statements(self, category: str, index: int) -> Statements:
        return foils.make_foils(category, index, canvas=self.canvas, seed=self.seed, clutter=self.clutter)


class SceneQuestions(SceneChoices):
    """Choices between the answers of a question, see :func:`.make_question`.

    Args:
        form: ``cloze``, beginnings of captions for a model that was trained on captions, scored without the end of the
            text; or ``question``, a prompt with short answers for an instruction-tuned one.
        others: those of :class:`.SceneChoices`.
    """

    all_categories = questions.CATEGORIES

    def __init__(self, form: questions.Form = "cloze", **others: Any):
        super().__init__(**others)
        self.form: questions.Form = form
        self.end = form == "question"
        self.fingerprint += f" {form}"

    def statements(self, category: str, index: int) -> Statements:
        return questions.make_question(category, index, form=self.form, canvas=self.canvas, seed=self.seed)
