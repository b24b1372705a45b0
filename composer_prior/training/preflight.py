"""Everything that can be checked before anything expensive starts, for a run and for the reference it has to train."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from composer.core import Time, Timestamp, TimeUnit, precision
from composer.distributed.activation_checkpointing import generate_composer_model_check_fn
from composer.models import ComposerModel
from composer.utils import dist, get_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from composer_prior.algorithms.token_weighting.token_weighting import check_algorithms, weighting_of
from composer_prior.data.captions import StreamingCaptionDataset, check_scorable
from composer_prior.data.messages import OneLineError, one_line
from composer_prior.data.nodes import on_first_rank
from composer_prior.data.remote import Remote
from composer_prior.data.scores import Scores, ScoresCard, ScoresError
from composer_prior.data.storage import StorageError, is_remote
from composer_prior.data.stores import is_denied
from composer_prior.data.tokenizer import build_tokenizer
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.training.builders import (
    build_all,
    build_loader,
    build_named,
    build_parallelism,
    build_precision,
    lvlm_skeleton,
    per_rank_batch_size,
    without_reference,
)
from composer_prior.training.checkpoints import find_checkpoint, find_weights
from composer_prior.training.checks import settings_of
from composer_prior.training.config import TrainConfig, reference_of
from composer_prior.training.optimizer import build_optimizer, check_new_weights
from composer_prior.training.reference import check_reference, model_folder, read_card


class StartError(ValueError):
    """What a library says when a run cannot start, as one line."""


@contextmanager
def one_line_errors(where: str = "") -> Iterator[None]:
    """Let what the libraries below raise at a run's start be one line that says where it comes from."""
    try:
        yield
    except StorageError as error:
        raise StartError(f"{where}: {error}".removeprefix(": ")) from error
    except OneLineError:
        raise
    except (ValueError, OSError, RuntimeError, ImportError, TypeError, LookupError, ArithmeticError) as error:
        if not where and isinstance(error, ValueError | TypeError | LookupError):
            raise  # a line of ours, or a fault of ours, which needs its traceback
        kind = f"{type(error).__name__}: " if isinstance(error, RuntimeError | LookupError) else ""
        said = kind + one_line(error)
        missing = error.__cause__ or error
        if isinstance(missing, ModuleNotFoundError) and missing.name:  # Composer's advice is its own extras
            package, extras = missing.name.partition(".")[0], metadata("composer-prior").get_all("Provides-Extra") or ()
            how = f"-e '.[{package}]'" if package in extras else package
            said = f"the package {package} is missing: pip install -c constraints.txt {how}"
        raise StartError(f"{where}: {said}".removeprefix(": ")) from error


def trained_recipes(recipe: TrainConfig) -> list[tuple[TrainConfig, str]]:
    """The recipes that will be trained, in order, each with the prefix of its keys: a reference first that is missing.

    Every rank calls it, and the first one looks.
    """
    if recipe.reference is None:
        return [(recipe, "")]
    reference = reference_of(recipe)
    missing = on_first_rank(lambda: read_card(reference) is None)
    return [(reference, "reference."), (recipe, "")] if missing else [(recipe, "")]


def check_parts(recipe: TrainConfig, where: str = "") -> None:
    """Refuse what needs neither data nor models to be known: the machine, the ranks, and every part but the model.

    Args:
        recipe: of one run.
        where: prefix of its keys.

    Raises:
        ValueError: naming the key.
    """
    device = get_device(None)
    try:
        precision._validate_precision(build_precision(recipe.precision), device)
    except ValueError as error:
        raise ValueError(f"{where}precision={recipe.precision} needs a GPU; set it to auto or fp32.") from error
    if recipe.device_train_microbatch_size == "auto" and device.name != "gpu":
        raise ValueError(f"{where}device_train_microbatch_size=auto needs a GPU; give a number of samples.")
    per_rank_batch_size(recipe.global_train_batch_size, where)
    for name in ("train_loader", "eval_loader"):
        config = getattr(recipe, name)
        if config is not None:
            arguments = {key: value for key, value in config.items() if key != "dataset"}
            with one_line_errors(f"{where}{name}"):
                DataLoader(_NoSamples(), batch_size=1, **arguments)
    with one_line_errors(f"{where}parallelism_config"):
        check_parallelism(recipe)
    if recipe.compile_config is not None:
        with one_line_errors(f"{where}compile_config"):
            torch.compile(nn.Identity(), **recipe.compile_config)
    for _, place, arguments in settings_of(recipe.optimizer, f"{where}optimizer"):  # torch looks at no group's values
        with one_line_errors(place):
            named = {"name": recipe.optimizer["name"], **arguments}
            build_named("optimizer", named, params=[nn.Parameter(torch.zeros(1))])
    with one_line_errors(f"{where}scheduler"):
        build_named("scheduler", recipe.scheduler)
    _algorithms(recipe, where)
    for kind in ("callback", "logger"):
        for name, arguments in getattr(recipe, f"{kind}s").items():
            with one_line_errors(f"{where}{kind}s.{name}"):
                build_all(kind, {name: arguments})
    if recipe.init_from is not None:
        with one_line_errors(f"{where}init_from={recipe.init_from}"):
            find_weights(recipe.init_from)
    if recipe.load_path is not None and not is_remote(recipe.load_path):
        with one_line_errors(f"{where}load_path={recipe.load_path}"):
            find_checkpoint(recipe.load_path)


def check_schedule(recipe: TrainConfig, batches: int, where: str = "") -> None:
    """Refuse a schedule that cannot say its rate at the first or at the last step, as Composer finds in training only.

    Args:
        recipe: of one run.
        batches: of an epoch.
        where: prefix of its keys.
    """
    total = Time.from_timestring(recipe.max_duration)
    steps = {TimeUnit.BATCH: total.value, TimeUnit.EPOCH: total.value * batches}.get(total.unit, 0)
    end = Timestamp(batch=int(steps), epoch=int(steps) // batches)
    with one_line_errors(f"{where}scheduler"), suppress(AttributeError):  # one from outside may need a whole State
        for now in (Timestamp(), end):
            state = SimpleNamespace(timestamp=now, max_duration=total, dataloader_len=Time(batches, "ba"))
            build_named("scheduler", recipe.scheduler)(state, 1.0)


def check_parallelism(recipe: TrainConfig) -> None:
    """Refuse values of FSDP2's configuration that Composer would stumble over, or pass over in silence.

    Raises:
        ValueError: naming what is accepted.
    """
    config = build_parallelism(recipe.parallelism_config)
    if config is None or config.fsdp2 is None:
        return
    for name, accepted in (("mixed_precision", ("DEFAULT", "PURE", "FULL")), ("state_dict_type", ("sharded", "full"))):
        value = getattr(config.fsdp2, name)
        if value not in accepted:
            raise ValueError(f"fsdp2.{name}={value!r}: expected {' or '.join(accepted)}")
    copies, ranks = config.fsdp2.data_parallel_replicate_degree, dist.get_world_size()
    if copies is not None and (copies < 1 or ranks % copies):
        raise ValueError(f"fsdp2.data_parallel_replicate_degree={copies}: expected a divisor of the {ranks} ranks")


def check_checkpointing(parallelism: Mapping[str, Any] | None, model: ComposerModel) -> None:
    """Refuse activation checkpointing or offloading that matches no part of a model; Composer would say nothing.

    Args:
        parallelism: the recipe's ``parallelism_config``.
        model: with or without weights.

    Raises:
        ValueError: naming the key.
    """
    fsdp2 = (parallelism or {}).get("fsdp2") or {}
    asked = [key for key in ("activation_checkpointing", "activation_cpu_offload") if fsdp2.get(key)]
    if asked and not any(map(generate_composer_model_check_fn(model), model.modules())):
        raise ValueError(
            f"parallelism_config.fsdp2.{asked[0]}=true matches no part of {type(model).__name__}: its language model "
            "names no transformer blocks. Leave the key out, or give the model an activation_checkpointing_fn."
        )


def check_whole(recipe: TrainConfig, where: str = "") -> None:
    """Refuse what data, tokenizer and the shapes of the model show; no weight is made or loaded, and no shard read.

    Args:
        recipe: of one run, whose data and tokenizer are there.
        where: prefix of its keys.

    Raises:
        ValueError, OSError: naming the key.
    """
    try:
        _check_whole(recipe, where)
    finally:
        gc.collect()  # streaming refuses to open a remote data set again while it is open


def _check_whole(recipe: TrainConfig, where: str) -> None:
    with one_line_errors(f"{where}tokenizer" if where else ""):
        tokenizer = build_tokenizer(recipe.tokenizer)
    model = _skeleton(recipe, tokenizer, where)
    loaders = build_loaders(recipe, model, scores=False, where=where)
    for name, spec in loaders.items():
        _check_samples(f"{where}{name}_loader", spec.dataloader)
        scores = getattr(recipe, f"{name}_loader")["dataset"].get("scores")
        if scores:
            check_scorable(spec.dataloader.dataset, scores)
            on_first_rank(partial(_check_stored_scores, scores, spec.dataloader.dataset))
    data = loaders["train"].dataloader.dataset
    check_schedule(recipe, len(cast(Any, loaders["train"].dataloader)), where)
    if isinstance(model, ComposerLVLM):
        check_fit(model, data)
        optimizer = build_optimizer(recipe.optimizer, model, f"{where}optimizer")
        algorithms = _algorithms(recipe, where)
        check_checkpointing(recipe.parallelism_config, model)
        check_algorithms(algorithms, model)
        check_new_weights(algorithms, optimizer, where)
    if recipe.reference is not None:
        _check_same_data(recipe, data)


def _skeleton(recipe: TrainConfig, tokenizer: Any, where: str) -> Any:
    """The model without its weights; where a component from outside cannot be built so, what only has a tokenizer."""
    if recipe.model["name"] != "lvlm":
        return _Stand(tokenizer)
    config = {key: value for key, value in recipe.model.items() if key != "name"}
    config["language"] = _language_of(recipe)
    try:
        with one_line_errors(f"{where}model" if where else ""):
            return lvlm_skeleton(tokenizer, **config)
    except StartError as error:
        if isinstance(error.__cause__, RuntimeError):  # a tower from outside that computes while it is built
            return _Stand(tokenizer)
        raise


class _NoSamples(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Stand:
    """In the place of a model of which nothing is known yet."""

    image_processor: Callable[[Any], Any] = staticmethod(lambda image: image)

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer


def _language_of(recipe: TrainConfig) -> dict[str, Any]:
    """The language model's recipe; that of the reference, where the model starts from one that is not there yet."""
    language = recipe.model["language"]
    if recipe.reference is not None:
        reference = reference_of(recipe)
        folder = model_folder(reference)
        pretrained = language.get("pretrained")
        if pretrained is not None and Path(pretrained) == folder and not folder.exists():
            return {**language, "pretrained": None, "config": None, **reference.model["language"]}
    return language


def _check_samples(where: str, loader: Any) -> None:
    """Refuse a data set that gives no batch: Composer would then wait for one for ever, or train on nothing."""
    if len(loader) == 0:
        key = f"{where.removesuffix('train_loader')}global_train_batch_size"
        remedy = f"lower {key}" if where.endswith("train_loader") else f"set {where}.drop_last=false"
        raise ValueError(
            f"{where}: of {loader.dataset.num_samples} samples each rank gets {len(loader.dataset)}, fewer than the "
            f"{loader.batch_size} of its first batch; {remedy}, or give more samples."
        )


def _check_stored_scores(path: str, data: StreamingCaptionDataset) -> None:
    """Refuse scores that are there and belong to other data, another tokenizer or other settings."""
    try:
        card = Scores(path, Path(path)).card
    except ScoresError as error:
        if is_denied(error):
            raise
        if is_remote(path):
            Remote(path).check_writable()
        return  # none, or not whole: they will be made
    card.check(ScoresCard.of(data, {}), path, reference=False)


def _check_same_data(recipe: TrainConfig, data: StreamingCaptionDataset) -> None:
    """Refuse a reference that was or would be trained on other captions than the run."""
    reference = reference_of(recipe)
    if read_card(reference) is not None:
        check_reference(recipe, data.fingerprint)
        return
    dataset = {**reference.train_loader["dataset"], "scores": None}
    ours = recipe.train_loader["dataset"]
    if all(dataset.get(key) == ours.get(key) for key in ("remote", "local", "split", "streams")):
        return
    theirs = StreamingCaptionDataset(tokenizer=data.tokenizer, batch_size=1, **dataset)
    if theirs.fingerprint != data.fingerprint:
        raise ValueError(
            "reference.train_loader.dataset holds other data than train_loader.dataset: the reference has to learn the "
            "captions of the run. Name the same data in both."
        )


def build_loaders(recipe: TrainConfig, model: Any, scores: bool = True, where: str = "") -> dict[str, Any]:
    """The loaders of a recipe, ``train`` and, where it has one, ``eval``.

    Args:
        recipe: of the run.
        model: whose tokenizer and image processor they use.
        scores: let samples carry the stored scores that the recipe names.
        where: prefix of the recipe's keys, for messages.
    """
    batch_sizes = {
        "train": per_rank_batch_size(recipe.global_train_batch_size),
        "eval": recipe.device_eval_batch_size,
    }
    loaders = {}
    for name, batch_size in batch_sizes.items():
        config = getattr(recipe, f"{name}_loader")
        if config is not None:
            dataset = config["dataset"] if scores else {**config["dataset"], "scores": None}
            with one_line_errors(f"{where}{name}_loader"):
                loaders[name] = build_loader(
                    {**config, "dataset": dataset},
                    model.tokenizer,
                    getattr(model, "image_processor", None),
                    batch_size,
                    shuffle_seed=recipe.seed,
                    drop_last=name == "train",
                )
    return loaders


def check_fit(model: ComposerLVLM, data: StreamingCaptionDataset) -> None:
    """Refuse data whose longest sequence the language model has no positions for.

    Raises:
        ValueError: naming the lengths.
    """
    tower: Any = model.model.vision
    image_tokens = tower.max_image_tokens if tower is not None else 0
    longest = 1 + image_tokens + len(data.prompt_ids) + data.max_caption_tokens
    positions = getattr(model.model.language.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"model.language has {positions} positions, and a sequence may take {longest}: bos, {image_tokens} image, "
            f"{len(data.prompt_ids)} prompt and {data.max_caption_tokens} caption tokens; lower "
            "train_loader.dataset.max_caption_tokens or the image's size."
        )


def _algorithms(recipe: TrainConfig, where: str) -> list[Any]:
    """The algorithms of a recipe, without the reference's weights."""
    built = []
    for name, arguments in without_reference(recipe.algorithms).items():
        with one_line_errors(f"{where}algorithms.{name}"):
            built += build_all("algorithm", {name: arguments})
    weighting_of(built)  # refuses two
    return built
