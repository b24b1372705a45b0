"""Choices between texts about emoji scenes, which are made when they are asked for, as many of each category."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from composer_prior.emoji_scenes import foils, questions
from composer_prior.emoji_scenes.captions import Clutter, templates_of
from composer_prior.emoji_scenes.drawings import check_drawings, versions
from composer_prior.emoji_scenes.scenes import CLASSES, draw_scene
from composer_prior.emoji_scenes.statements import Statements
from composer_prior.evaluation.choices import Choice, ChoiceBenchmark
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.reference import ReferenceLM
from composer_prior.registry import Count, Whole, check_value, did_you_mean

Side = Annotated[int, "of at least 32"]
ANSWER_TOKENS = 16  # a longer answer is wrong
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

    all_categories: tuple[str, ...]

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
    """Questions about a scene and their answers, see :func:`.make_question`.

    With ``form: answer`` the figures are ``generated``, the share of right answers, and ``generated_shuffled``, that
    with another sample's image. Case, spaces and a full stop do not count.

    Args:
        form: ``cloze``, beginnings of captions for a model that was trained on captions, scored without the end of the
            text; ``question``, a prompt with short answers for an instruction-tuned one; or ``answer``, the same
            prompt, to which the model generates its answer.
        others: those of :class:`.SceneChoices`.
    """

    headline: ClassVar[Mapping[str, str]] = {
        "answers right": "generated",
        "answers with another image": "generated_shuffled",
        **SceneChoices.headline,
    }

    def __init__(self, form: Literal["cloze", "question", "answer"] = "cloze", **others: Any):
        self.all_categories = questions.CLOZES if form == "cloze" else questions.CATEGORIES
        super().__init__(**others)
        self.form = form
        self.end = form != "cloze"
        self.fingerprint += f" {form}"

    def statements(self, category: str, index: int) -> Statements:
        form: questions.Form = "cloze" if self.form == "cloze" else "question"
        return questions.make_question(category, index, form=form, canvas=self.canvas, seed=self.seed)

    def predict(self, model: ImageTextModel, numbers: Sequence[int]) -> list[dict[str, Any]]:
        if self.form != "answer":
            return super().predict(model, numbers)
        found = []
        for number in numbers:
            sample, other = self.choice(number), self.other(number)
            line: dict[str, Any] = {"category": sample.category, "question": sample.prompt, "answers": [*sample.texts]}
            line["generated"] = _answer(model, sample, sample)
            line["generated_shuffled"] = None if other == number else _answer(model, sample, self.choice(other))
            found.append(line)
        return found

    def points(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        if self.form != "answer":
            return super().points(prediction)
        true, *others = prediction["answers"]
        points = {"chance": 1 / (1 + len(others))}
        for name in ("generated", "generated_shuffled"):
            given = prediction[name]
            points[name] = np.nan if given is None else float(given.strip().rstrip(".").lower() == true)
        return points


def _answer(model: ImageTextModel, asked: Choice, shown: Choice) -> str:
    """Return a model's own answer to a sample's question about the image of a sample."""
    return model.generate_captions([shown.image], asked.prompt, ANSWER_TOKENS)[0]
