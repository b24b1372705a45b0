"""Train the model of a recipe; missing inputs are created first: data, tokenizer, reference, viewer, scores.

Existing inputs are reused, or rejected if they do not match.
"""

import gc
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.utils import dist, get_device
from huggingface_hub import HfFileSystem

from composer_prior import registry
from composer_prior.data.captions import read_captions
from composer_prior.data.hub import check_push, why_not
from composer_prior.data.messages import NO_INDEX, announce
from composer_prior.data.nodes import check_shared, on_first_rank, sole_job
from composer_prior.data.remote import Remote
from composer_prior.data.scores import INDEX, KEYS
from composer_prior.data.storage import is_remote, whole_folder
from composer_prior.data.stores import is_denied
from composer_prior.data.tokenizer import train_tokenizer
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.score import blind_viewer, score_captions
from composer_prior.training.builders import one_line_errors
from composer_prior.training.checkpoints.start import check_bucket, check_replaced
from composer_prior.training.checkpoints.storage import CHECKPOINT_NAME
from composer_prior.training.config import HELPERS, TrainConfig
from composer_prior.training.keys import check_keys
from composer_prior.training.reference import (
    check_helper,
    compared_with,
    metadata_file,
    model_folder,
    reference_of,
    short_viewer,
    viewer_of,
)
from composer_prior.training.trainer import build_trainer, complete, finish
from composer_prior.training.validate import check_parts, check_whole, frozen_at_random, trained_recipes


def train(recipe: TrainConfig) -> Trainer:
    """Run a recipe to its end; missing inputs are created first.

    Args:
        recipe: from :func:`.load_recipe`.

    Raises:
        ValueError, FileNotFoundError: before training, if the recipe cannot run.
    """
    check_keys(recipe)
    with sole_run(recipe):
        return finish(recipe, start(recipe))


def start(recipe: TrainConfig) -> Trainer:
    """Prepare data, tokenizer and reference, and build the Trainer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    announce(on_first_rank(partial(short_viewer, recipe)))
    prepare(recipe)
    ensure_scores(recipe)
    return build_trainer(recipe)


@contextmanager
def sole_run(recipe: TrainConfig, where: str = "") -> Iterator[None]:
    """Lock the folders that a run writes to, see :func:`.sole_job`; ``where`` is the prefix of its keys."""
    dist.initialize_dist(get_device(None), timeout=recipe.dist_timeout)
    places, saved = {"run_folder": recipe.run_folder}, recipe.save_folder or ""
    # Compared as words: looked up here, a folder would not be seen later by a node of a network disk.
    run, save = (Path(os.path.abspath(os.path.expanduser(place))) for place in (recipe.run_folder, saved))
    if saved and not is_remote(saved) and run not in (save, *save.parents):
        places["save_folder"] = saved
    with sole_job({f"{where}{key}": place for key, place in places.items()}):
        yield


def prepare(recipe: TrainConfig, itself: bool = True, helpers: Collection[str] = HELPERS) -> None:
    """Create the data, tokenizer, reference and viewer of a recipe that are missing, on the first rank of all.

    The recipes that will be trained, those of ``helpers`` that are missing and with ``itself`` the run, are checked
    before anything is made.

    Raises:
        ValueError, OSError: naming what cannot work.
    """
    dist.initialize_dist(get_device(None), timeout=recipe.dist_timeout)
    wanted = {f"{key}." for key in helpers} | ({""} if itself else set())
    stages = [(stage, where) for stage, where in trained_recipes(recipe) if where in wanted]
    check_shared(_places(recipe, stages))
    with ExitStack() as held:
        for stage, where in stages:
            if stage is not recipe:
                held.enter_context(sole_run(stage, where))
        for stage, where in stages:
            check_parts(stage, where)
            announce(frozen_at_random(stage, where))
            with one_line_errors(f"{where}save_folder"):
                on_first_rank(partial(check_bucket, stage))
            on_first_rank(partial(check_replaced, stage, where))
            for name, arguments in stage.callbacks.items():
                if is_remote((arguments or {}).get("save_folder") or ""):  # of hf_checkpointer
                    with one_line_errors(f"{where}callbacks.{name}"):
                        on_first_rank(Remote(arguments["save_folder"]).check_writable)
            if recipe.data is None:
                on_first_rank(partial(_check_data, stage))
        for stage in (*recipe.helpers.values(), recipe) if itself else ():  # after these: it makes repositories
            on_first_rank(partial(check_push, stage.push_to_hub, "model"))
        on_first_rank(lambda: _make_data(recipe.data))
        _make_tokenizer(recipe.tokenizer, recipe.train_loader["dataset"])
        for stage, where in stages:
            check_whole(stage, where)
            gc.collect()  # streaming refuses to open a remote data set again while it is open
        for key, helper in recipe.helpers.items():
            if key in helpers:
                _prepare_helper(recipe, key, missing=any(stage is helper for stage, _ in stages))


def _check_data(recipe: TrainConfig) -> None:
    """Raise for a folder without a data set, when the recipe does not make one."""
    for loader in recipe.loaders.values():
        dataset = loader.get("dataset") or {}
        for place in (dataset.get("streams") or {"": dataset}).values():
            split = place.get("split") or dataset.get("split") or ""
            folder = Path(place.get("local") or "", split).expanduser()
            if place.get("local") and (folder / INDEX).exists():
                continue  # Streaming does not ask for the index of a remote either
            remote = "/".join(filter(None, (place.get("remote"), split)))
            if remote.startswith("hf://"):
                _check_hub(remote, f"composer-prior convert {place['remote']} data/captions")
            elif place.get("local") and not remote:
                raise FileNotFoundError(NO_INDEX.format(folder))


def _check_hub(remote: str, command: str) -> None:
    """Raise for a data set of the Hub without an index, which a command makes, or that cannot be reached."""
    try:
        HfFileSystem().info(f"{remote}/{INDEX}")
    except Exception as error:  # of any HTTP library
        if isinstance(error, FileNotFoundError) and not is_denied(error):
            message = f"{remote}: no {INDEX} there. Convert it: {command}; then train=data/captions."
            raise FileNotFoundError(message) from error
        raise ValueError(f"{remote} cannot be read: {why_not(error)}.") from error


def _places(recipe: TrainConfig, stages: Sequence[tuple[TrainConfig, str]]) -> dict[str, str]:
    """Return the paths that all nodes share: of what the first rank makes, of checkpoints, and those of the recipe."""
    places: dict[str, Any] = {}
    if recipe.data is not None:
        places["data.out"] = recipe.data["out"]
    if recipe.tokenizer.get("train") is not None:
        places["tokenizer.name"] = recipe.tokenizer["name"]
    for key, helper in recipe.helpers.items():
        places[f"{key}.run_folder"] = str(metadata_file(helper))
    for stage, where in stages:
        if stage.save_folder is not None:
            places[f"{where}save_folder"] = os.path.join(stage.save_folder, CHECKPOINT_NAME)
        places |= {f"{where}{key}": getattr(stage, key) for key in ("load_path", "init_from")}
        for name, loader in stage.loaders.items():
            dataset = loader.get("dataset") or {}
            for key in KEYS:
                if dataset.get(key):
                    places[f"{where}{name}.dataset.{key}"] = os.path.join(dataset[key], INDEX)
            if not dataset.get("remote"):
                places[f"{where}{name}.dataset.local"] = dataset.get("local")
    return {key: place for key, place in places.items() if place is not None}


def _prepare_helper(recipe: TrainConfig, key: str, missing: bool) -> None:
    helper = recipe.helpers[key]
    folder = model_folder(helper)
    if missing:
        resuming = Path(helper.run_folder, "checkpoints").exists()
        announce(f"{key.capitalize()}: {'resuming' if resuming else 'training'} {helper.run_name}, into {folder}")
        ensure_scores(helper)
        complete(helper, build_trainer(helper))
        gc.collect()  # streaming refuses to open a remote data set again while it is open
    else:
        announce(f"{key.capitalize()}: reusing {folder}")
    check_helper(recipe, key)


def _make_data(config: Mapping[str, Any] | None) -> None:
    if config is None:
        return
    out = Path(config["out"])
    announce(f"Data: reusing {out}" if out.exists() else f"Data: making {config['name']} in {out}")
    arguments = registry.without_name(config)
    registry.build("data", config["name"], arguments, "data")  # returns at once if they are there already


def _make_tokenizer(config: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    if config.get("train") is None:
        return
    folder = Path(config["name"])
    if on_first_rank(folder.exists):
        announce(f"Tokenizer: reusing {folder}")
        return
    vocab_size = config["train"]["vocab_size"]
    announce(f"Tokenizer: training {vocab_size} tokens on the training captions, into {folder}")
    captions = read_captions(dataset)

    def make() -> None:
        with whole_folder(folder) as temporary:
            train_tokenizer(captions, vocab_size).save_pretrained(temporary)

    on_first_rank(make)


def ensure_scores(recipe: TrainConfig) -> None:
    """Make the scores that a recipe's loaders name, unless they are there; its reference and viewer must be.

    Existing scores are checked against the model that the recipe names; without one, only the loader checks them.

    Raises:
        ScoresError: if they belong to something else, naming what differs.
    """
    viewer = viewer_of(recipe)
    for loader in recipe.loaders.values():
        dataset = loader.get("dataset") or {}
        if recipe.reference is not None and dataset.get("scores"):
            announce(str(score_captions(job_of(recipe, dataset))))
        if viewer is not None and dataset.get("viewer_scores"):
            announce(str(score_captions(job_of(recipe, dataset, viewer=viewer))))
        if all(dataset.get(key) for key in KEYS) and "reference" in compared_with(recipe):
            announce(on_first_rank(partial(blind_viewer, dataset["viewer_scores"], dataset["scores"])))


def job_of(recipe: TrainConfig, dataset: Mapping[str, Any], **changes: Any) -> ScoreJob:
    """Return the job that makes the scores of a recipe's data set; ``changes`` are to fields of :class:`.ScoreJob`.

    Raises:
        ValueError: if there is neither a reference nor a viewer, or nothing says where the scores go.
    """
    key = "viewer_scores" if changes.get("viewer") else "scores"
    given = {"tokenizer": recipe.tokenizer, "dataset": dict(dataset), "progress_bar": recipe.progress_bar}
    if key == "scores":
        given["reference"] = reference_of(recipe)
        if given["reference"] is None:
            raise ValueError(
                "The recipe has no reference. Name a model with algorithms.prior.reference=FOLDER, or score without a "
                "recipe: out=... reference=... tokenizer.name=... dataset.local=..."
            )
    own = model_folder(recipe.helpers["viewer"]) if "viewer" in recipe.helpers else None
    if own is not None and key == "viewer_scores" and "out" not in changes and Path(changes["viewer"]) != own:
        raise ValueError(f"viewer={changes['viewer']} is not the recipe's viewer, {own}: give out=...")
    out = changes.pop("out", None) or dataset.get(key)
    if not out:
        raise ValueError(f"Where do the scores go? Give out=..., or dataset.{key} in the recipe.")
    return ScoreJob(out=str(out), **{**given, **recipe.scoring, **changes})
