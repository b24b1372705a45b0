"""The command that scores captions: with the reference of a recipe, or without a recipe."""

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from composer.utils import dist, get_device
from omegaconf import OmegaConf

from composer_prior.data.messages import OneLineError, announce, one_line
from composer_prior.options import Option, options_of, parse_options
from composer_prior.registry import did_you_mean
from composer_prior.scoring.job import BESIDE_RECIPE, ScoreJob
from composer_prior.scoring.score import score_captions
from composer_prior.training.checks import check_recipe
from composer_prior.training.config import load_recipe
from composer_prior.training.prepare import job_of, prepare

_USAGE = (
    "usage: composer-prior score RECIPE.yaml [out=...] [loader=train|eval] [batch_tokens=...] "
    "[unit_samples=...] [dtype=bfloat16] [key=value of the recipe ...]\n"
    "   or: composer-prior score out=... reference=... tokenizer.name=... dataset.local=... [...]"
)


def main(arguments: Sequence[str]) -> None:
    """``score_captions.py RECIPE [key=value ...]``, or the keys of a :class:`ScoreJob` without a recipe."""
    if not arguments:
        sys.exit(_USAGE)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        recipe_given = "=" not in arguments[0]
        announce(str(score_captions(_recipe_job(arguments) if recipe_given else _explicit_job(arguments))))
    except (ValueError, OSError, OneLineError) as error:
        sys.exit(f"error: {one_line(error)}")


def _recipe_job(arguments: Sequence[str]) -> ScoreJob:
    """The job of a recipe, after what it needs and does not find has been made."""
    own = [word for word in arguments[1:] if word.split("=")[0] in BESIDE_RECIPE]
    known = {**options_of(ScoreJob), "loader": Option("loader", str, "train", "")}
    _, options = parse_options(own, known)
    loader = options.pop("loader", "train")
    if loader not in ("train", "eval"):
        raise ValueError(f"loader={loader!r}: expected train or eval.")
    recipe = load_recipe(arguments[0], [word for word in arguments[1:] if word not in own])
    for path in recipe.code_paths:
        runpy.run_path(path)
    check_recipe(recipe)
    config = getattr(recipe, f"{loader}_loader")
    if config is None:
        raise ValueError(f"The recipe has no {loader}_loader.")
    job = job_of(recipe, config["dataset"], **options)
    prepare(recipe, itself=False)
    return job


def _explicit_job(arguments: Sequence[str]) -> ScoreJob:
    given = OmegaConf.from_dotlist(list(arguments))
    names = [field.name for field in fields(ScoreJob)]
    for key in map(str, given):
        if key not in names:
            raise ValueError(f"{key} is not a key. {did_you_mean(key, names)}")
    job = OmegaConf.merge(OmegaConf.structured(ScoreJob), given)
    if OmegaConf.missing_keys(job) or "name" not in job.tokenizer:
        raise ValueError("Without a recipe, give out=..., reference=..., tokenizer.name=... and dataset.local=...")
    dist.initialize_dist(get_device(None), timeout=3600)
    return ScoreJob(**cast(dict[str, Any], OmegaConf.to_container(job)))
