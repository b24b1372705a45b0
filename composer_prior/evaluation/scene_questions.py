"""Questions about emoji scenes that are answered by the likelihood of each possible answer."""

from typing import Any

from composer_prior.emoji_scenes.questions import CATEGORIES, Form, make_question
from composer_prior.emoji_scenes.statements import Statements
from composer_prior.evaluation.scene_choices import SceneChoices
from composer_prior.registry import register


@register("benchmark", "scene_questions")
class SceneQuestions(SceneChoices):
    """Which answer fits, see :func:`.make_question`.

    Args:
        form: ``cloze``, beginnings of captions for a model that was trained on captions, scored without the end of the
            text; or ``question``, a prompt with short answers for an instruction-tuned one.
        others: those of :class:`.SceneChoices`.
    """

    all_categories = CATEGORIES

    def __init__(self, form: Form = "cloze", **others: Any):
        super().__init__(**others)
        self.form: Form = form
        self.end = form == "question"
        self.fingerprint += f" {form}"

    def statements(self, category: str, index: int) -> Statements:
        return make_question(category, index, form=self.form, canvas=self.canvas, seed=self.seed)
