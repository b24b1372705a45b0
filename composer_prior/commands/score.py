"""``composer-prior score RECIPE.yaml [option=value ...] [key=value ...]``, or a job's keys without a recipe."""

import os
from functools import partial
from typing import Any

from composer.utils import dist, get_device
from transformers import AutoConfig

from composer_prior.data.hub import check_push, load_pretrained
from composer_prior.data.messages import announce, one_line_exit
from composer_prior.data.nodes import on_first_rank
from composer_prior.data.scores import METADATA
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.score import blind_viewer, score_captions
from composer_prior.training.config import TrainConfig
from composer_prior.training.reference import compared_with, short_viewer
from composer_prior.training.run import job_of, prepare


@one_line_exit()
def run(recipe: TrainConfig | None, options: dict[str, Any]) -> None:
    """Score captions; missing inputs of a recipe are created first.

    Args:
        recipe: whose reference and data to take.
        options: fields of :class:`.ScoreJob`, and the ``loader`` of the recipe.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    dist.initialize_dist(get_device(None), timeout=3600 if recipe is None else recipe.dist_timeout)
    if recipe is None:
        job = ScoreJob(**options)
    else:
        loader = options.pop("loader", "train")
        config = getattr(recipe, f"{loader}_loader")
        if config is None or not config.get("dataset"):
            raise ValueError(f"The recipe has no {loader}_loader with a dataset.")
        job = job_of(recipe, config["dataset"], **options)
        if job.viewer is not None:  # before anything is made
            load_pretrained(AutoConfig, job.viewer, job.trust_remote_code)
            announce(on_first_rank(partial(short_viewer, recipe, job.viewer)))
        on_first_rank(partial(check_push, job.push_to_hub, "dataset", job.out, METADATA))
        prepare(recipe, itself=False, helpers=("reference",) if job.viewer is None else ())
    announce(str(score_captions(job)))
    compares = recipe is None or "reference" in compared_with(recipe)
    first = dist.get_global_rank() == 0  # the others wait for nothing: a push may take longer than a collective allows
    if first and job.viewer is not None and compares and (stored := job.dataset.get("scores")):
        announce(blind_viewer(job.out, stored))
