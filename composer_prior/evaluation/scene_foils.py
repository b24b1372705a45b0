"""Captions of emoji scenes of which one is true and the others have one wrong fact."""

from composer_prior.emoji_scenes.foils import CATEGORIES, make_foils
from composer_prior.emoji_scenes.statements import Statements
from composer_prior.evaluation.scene_choices import SceneChoices
from composer_prior.registry import register


@register("benchmark", "scene_foils")
class SceneFoils(SceneChoices):
    """Which caption fits: one fact is wrong in each of the others, see :func:`.make_foils`."""

    all_categories = CATEGORIES

    def statements(self, category: str, index: int) -> Statements:
        return make_foils(category, index, canvas=self.canvas, seed=self.seed)
