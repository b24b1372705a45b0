"""``composer-prior plan RECIPE.yaml [option=value ...] [key=value ...]``."""

from typing import Any

from composer_prior.data.messages import announce, one_line_exit
from composer_prior.training.config import TrainConfig
from composer_prior.training.plan import plan


@one_line_exit()
def run(recipe: TrainConfig, options: dict[str, Any]) -> None:
    """Print what a run takes.

    Args:
        recipe: of the run.
        options: of :func:`.plan`.
    """
    announce(str(plan(recipe, **options)))
