"""Make what a recipe needs and does not find: data, tokenizer, reference, scores, in this order."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.utils import dist, get_device

from composer_prior import registry
from composer_prior.data.captions import read_captions
from composer_prior.data.messages import announce
from composer_prior.data.storage import whole_folder
from composer_prior.data.tokenizer import train_tokenizer
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.score import score_captions
from composer_prior.training.config import TrainConfig
from composer_prior.training.preflight import check_parts, check_whole
from composer_prior.training.reference import check_reference, model_folder, read_card
from composer_prior.training.trainer import build_trainer, finish


def prepare(recipe: TrainConfig, stages: Sequence[tuple[TrainConfig, str]]) -> None:
    """Make the data, tokenizer and reference that a recipe needs and does not find.

    Args:
        recipe: of the run.
        stages: of :func:`.trained_recipes`, those that will be trained; all that can be known of them is checked first.

    Raises:
        ValueError, OSError: naming what cannot work.
    """
    for stage, where in stages:
        check_parts(stage, where)
    dist.initialize_dist(get_device(None), timeout=recipe.dist_timeout)
    prepare_data(recipe)
    for stage, where in stages:
        check_whole(stage, where)
    if recipe.reference is not None:
        _prepare_reference(recipe)


def _prepare_reference(recipe: TrainConfig) -> None:
    assert recipe.reference is not None
    reference = TrainConfig(**recipe.reference)
    folder = model_folder(reference)
    if read_card(reference) is None:
        resuming = Path(reference.run_folder, "checkpoints").exists()
        announce(f"Reference: {'resuming' if resuming else 'training'} {reference.run_name}, into {folder}")
        finish(reference, build_trainer(reference))
        gc.collect()  # streaming refuses to open a remote data set again while it is open
    else:
        announce(f"Reference: reusing {folder}")
    check_reference(recipe)


def prepare_data(recipe: TrainConfig) -> None:
    """Make data and tokenizer if they are missing; the first rank of each node does it while the others wait."""
    with dist.run_local_rank_zero_first():
        if dist.get_local_rank() == 0:
            _make_data(recipe.data)
    _make_tokenizer(recipe.tokenizer, recipe.train_loader["dataset"])


def _make_data(config: Mapping[str, Any] | None) -> None:
    if config is None:
        return
    out = Path(config["out"])
    announce(f"Data: reusing {out}" if out.exists() else f"Data: making {config['name']} in {out}")
    arguments = {key: value for key, value in config.items() if key != "name"}
    registry.build("data", config["name"], arguments, "data")  # returns at once if they are there already


def _make_tokenizer(config: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    if config.get("train") is None:
        return
    folder = Path(config["name"])
    missing = not folder.exists()
    if not any(dist.all_gather_object(missing)):  # on every node
        announce(f"Tokenizer: reusing {folder}")
        return
    vocab_size = config["train"]["vocab_size"]
    announce(f"Tokenizer: training {vocab_size} tokens on the training captions, into {folder}")
    captions = read_captions(dataset)
    with dist.run_local_rank_zero_first():
        if missing and dist.get_local_rank() == 0:
            with whole_folder(folder) as temporary:
                train_tokenizer(captions, vocab_size).save_pretrained(temporary)


def ensure_scores(recipe: TrainConfig) -> None:
    """Make the scores that a recipe's loaders name (``dataset.scores``), unless they are there; its reference must be.

    Scores that are there are checked against the recipe's reference; without one in the recipe, only the loader checks
    them.

    Raises:
        ScoresError: if they belong to something else, naming what differs.
    """
    for loader in (recipe.train_loader, recipe.eval_loader):
        if recipe.reference is not None and loader is not None and loader["dataset"].get("scores"):
            announce(str(score_captions(job_of(recipe, loader["dataset"]))))


def job_of(recipe: TrainConfig, dataset: Mapping[str, Any], **changes: Any) -> ScoreJob:
    """The job that makes the scores of one of a recipe's data sets.

    Args:
        recipe: with a reference.
        dataset: of its ``train_loader`` or ``eval_loader``.
        changes: fields of :class:`ScoreJob`.

    Raises:
        ValueError: if the recipe has no reference, or nothing says where the scores go.
    """
    if recipe.reference is None:
        raise ValueError("The recipe has no reference. Score without a recipe: dataset.local=... reference=... out=...")
    out = changes.pop("out", None) or dataset.get("scores")
    if not out:
        raise ValueError("Where do the scores go? Give out=..., or dataset.scores in the recipe.")
    folder = model_folder(TrainConfig(**recipe.reference))
    given = {"tokenizer": recipe.tokenizer, "dataset": dict(dataset), "progress_bar": recipe.progress_bar}
    return ScoreJob(out=str(out), reference=str(folder), **{**given, **recipe.scoring, **changes})
