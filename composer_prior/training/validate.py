"""Checks before anything expensive starts, of a run and of the reference that it trains first.

In this order: :func:`.check_keys` reads the recipe alone; :func:`check_parts` builds every part but the model before
data are made; :func:`check_whole` builds the model on the meta device and opens the data.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from composer.core import Time, Timestamp, TimeUnit, precision
from composer.utils import get_device
from PIL import Image
from torch import nn
from torch.utils.data import ChainDataset, DataLoader
from transformers import AutoConfig, AutoProcessor

from composer_prior import registry
from composer_prior.algorithms.token_weighting.token_weighting import TokenWeighting, check_algorithms, weighting_of
from composer_prior.data.batch import stream_names
from composer_prior.data.captions import StreamingCaptionDataset, check_scorable
from composer_prior.data.hub import load_pretrained
from composer_prior.data.messages import announce
from composer_prior.data.nodes import on_first_rank
from composer_prior.data.processing import ProcessorInputs
from composer_prior.data.remote import Remote
from composer_prior.data.scores import KEYS, Scores, ScoresError, ScoresMetadata
from composer_prior.data.storage import is_remote
from composer_prior.data.stores import is_denied
from composer_prior.data.tokenizer import build_tokenizer
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.hugging_face import check_image_tokens
from composer_prior.models.model_folder import empty_copy, load_processor
from composer_prior.models.open_clip_source import brings_weights
from composer_prior.models.sharding import build_parallelism, check_checkpointing
from composer_prior.models.viewer import check_processors
from composer_prior.scoring.job import ScoreJob
from composer_prior.training.benchmarks import build_benchmarks
from composer_prior.training.builders import (
    SKELETONS,
    StartError,
    build_all,
    build_loaders,
    build_named,
    build_precision,
    build_profiler,
    one_line_errors,
    per_rank_batch_size,
    trusts_code,
    without_models,
)
from composer_prior.training.checkpoints.loading import load_weights
from composer_prior.training.checkpoints.start import resumes
from composer_prior.training.checkpoints.storage import find_checkpoint, find_weights
from composer_prior.training.config import TrainConfig
from composer_prior.training.keys import check_keys, settings_of
from composer_prior.training.optimizer import build_optimizer, check_new_weights
from composer_prior.training.reference import check_helper, model_folder, read_metadata


def trained_recipes(recipe: TrainConfig) -> list[tuple[TrainConfig, str]]:
    """Return on every rank the recipes to be trained, with the prefix of their keys: missing helpers first."""
    missing = on_first_rank(lambda: [key for key, helper in recipe.helpers.items() if read_metadata(helper) is None])
    return [*((recipe.helpers[key], f"{key}.") for key in missing), (recipe, "")]


def check_parts(recipe: TrainConfig, where: str = "") -> None:
    """Check the machine, the ranks, and every part but the model by building it; data and models may be missing."""
    check_keys(recipe, where)  # again: towers check values too once they are imported
    device = get_device(None)
    try:
        precision._validate_precision(build_precision(recipe.precision), device)
    except ValueError as error:
        raise ValueError(f"{where}precision={recipe.precision} needs a GPU; set it to auto or fp32.") from error
    if recipe.device_train_microbatch_size == "auto" and device.name != "gpu":
        raise ValueError(f"{where}device_train_microbatch_size=auto needs a GPU; give a number of samples.")
    per_rank_batch_size(recipe.global_train_batch_size, where)
    parts: dict[str, Callable[[], object]] = {}
    for name, config in recipe.loaders.items():
        arguments = {key: value for key, value in config.items() if key != "dataset"}
        parts[name] = partial(DataLoader, ChainDataset([]), batch_size=1, **arguments)
    parts["scoring"] = partial(ScoreJob, "", "", {}, {}, **recipe.scoring)
    parts["parallelism_config"] = partial(build_parallelism, recipe.parallelism_config)
    parts["profiler"] = partial(build_profiler, recipe)
    if recipe.compile_config is not None:
        parts["compile_config"] = partial(torch.compile, nn.Identity(), **recipe.compile_config)
    for _, place, arguments in settings_of(recipe.optimizer, "optimizer"):  # torch looks at no group's values
        named = {"name": recipe.optimizer["name"], **arguments}
        parts[place] = partial(build_named, "optimizer", named, params=[nn.Parameter(torch.zeros(1))])
    parts["scheduler"] = partial(build_named, "scheduler", recipe.scheduler)
    for kind in ("callback", "logger"):
        for name, arguments in getattr(recipe, f"{kind}s").items():
            parts[f"{kind}s.{name}"] = partial(build_all, kind, {name: arguments}, recipe=recipe, run_id="")
    if recipe.init_from is not None:
        parts[f"init_from={recipe.init_from}"] = partial(find_weights, recipe.init_from)
    if recipe.load_path is not None and not is_remote(recipe.load_path):
        parts[f"load_path={recipe.load_path}"] = partial(find_checkpoint, recipe.load_path)
    for key, build in parts.items():
        with one_line_errors(f"{where}{key}"):
            build()
    _algorithms(recipe, where)


def frozen_at_random(recipe: TrainConfig, where: str = "") -> str:
    """Return a warning if weights of a model of ours or of transformers stay as random as they begin; "" if none do."""
    model = recipe.model
    if recipe.init_from is not None or recipe.load_path is not None or model["name"] not in SKELETONS:
        return ""
    if model["name"] == "hugging_face":
        given = {
            f"model.freeze={model.get('freeze')}": model.get("freeze"),
            "model.lora": model.get("lora") is not None,
        }
        keys = [key for key, value in given.items() if value and not model.get("pretrained")]
    else:
        parts = {part: model.get(part) or {} for part in ("vision", "projector", "language")}
        keys = [
            f"model.{part}.freeze=true"
            for part, given in parts.items()
            if given.get("freeze") and not (given.get("pretrained") or brings_weights(given.get("architecture") or ""))
            if part != "vision" or given.get("name") in registry.shipped("vision")  # others may load theirs
        ]
        if parts["language"].get("lora") is not None and not parts["language"].get("pretrained"):
            keys.append("model.language.lora")
    if not keys:
        return ""
    return (
        f"Warning: {', '.join(where + key for key in keys)} keeps random weights as they are: train them, or give "
        "pretrained ones."
    )


def check_schedule(recipe: TrainConfig, batches: int, where: str = "") -> None:
    """Raise for a schedule without a rate at the first or the last step, which Composer finds in training only."""
    total = Time.from_timestring(recipe.max_duration)
    steps = {TimeUnit.BATCH: total.value, TimeUnit.EPOCH: total.value * batches}.get(total.unit, 0)
    end = Timestamp(batch=int(steps), epoch=int(steps) // batches)
    with one_line_errors(f"{where}scheduler"), suppress(AttributeError):  # one from outside may need a whole State
        for now in (Timestamp(), end):
            state = SimpleNamespace(timestamp=now, max_duration=total, dataloader_len=Time(batches, "ba"))
            build_named("scheduler", recipe.scheduler)(state, 1.0)


def check_whole(recipe: TrainConfig, where: str = "") -> None:
    """Check data, tokenizer and the shapes of the model; no weight is made or loaded.

    No shard is read, but for ``packing_ratio=auto``, and of conversations without a chat template.
    """
    with one_line_errors(f"{where}tokenizer" if where else ""):
        tokenizer = build_tokenizer(recipe.tokenizer)
    model = skeleton_of(recipe, tokenizer, where)
    loaders = build_loaders(recipe, model, scores=False, where=where)
    for name, spec in loaders.items():
        _check_samples(f"{where}{name}", spec.dataloader)
        on_first_rank(cast(Any, spec.dataloader).dataset.check_template)
        dataset = recipe.loaders[name]["dataset"]
        for key, column in KEYS.items():
            if dataset.get(key):
                check_scorable(spec.dataloader.dataset, dataset[key], key)
                on_first_rank(partial(_check_stored_scores, dataset[key], spec.dataloader.dataset, column))
    _check_labels(recipe, stream_names(loaders["eval_loader"].dataloader) if "eval_loader" in loaders else [], where)
    data = loaders["train_loader"].dataloader.dataset
    check_schedule(recipe, len(cast(Any, loaders["train_loader"].dataloader)), where)
    if recipe.push_to_hub is not None:
        with one_line_errors(f"{where}push_to_hub={recipe.push_to_hub}: the run would leave no model folder"):
            _check_model_folder(model)
    if isinstance(model, ComposerLVLM):
        for name, spec in loaders.items():
            check_fit(model, cast(Any, spec.dataloader).dataset, f"{where}{name}")
        if recipe.init_from is not None and not on_first_rank(partial(resumes, recipe)):
            with one_line_errors(f"{where}init_from" if where else ""):
                on_first_rank(partial(load_weights, recipe.init_from, model, trusts_code(recipe)))
        _check_positions_of_reference(recipe, model, data, where)
        with one_line_errors(f"{where}model" if where else ""):
            announce(on_first_rank(partial(check_image_tokens, model, recipe.model)))
        optimizer = build_optimizer(recipe.optimizer, model, f"{where}optimizer")
        algorithms = _algorithms(recipe, where)
        check_checkpointing(recipe.parallelism_config, model)
        check_algorithms(algorithms, model)
        for weighting in (one for one in algorithms if isinstance(one, TokenWeighting)):
            weighting.check_streams(data.stream_names)
        check_new_weights(algorithms, optimizer, where)
        build_benchmarks(without_models("benchmark", recipe.benchmarks), model, where=where)
        _check_live_viewer(recipe, model, where)
    for key, helper in recipe.helpers.items():
        _check_same_data(recipe, key, helper, data)


def _check_model_folder(model: Any) -> None:
    if not isinstance(model, ComposerLVLM):
        raise ValueError(f"{type(model).__name__} is not saved in Hugging Face format")
    empty_copy(model.model)


def _check_labels(recipe: TrainConfig, streams: list[str], where: str) -> None:
    """Raise for a further loader whose metrics would have the names of a stream's of the validation."""
    for name in recipe.eval_loaders:
        if "/" in name or (len(streams) > 1 and name in streams):
            raise ValueError(
                f"{where}eval_loaders.{name}: its metrics, metrics/eval/{name}/loss and others, may be those of a "
                "stream of eval_loader; give it a name of its own, without a slash."
            )


def _check_positions_of_reference(
    recipe: TrainConfig, model: ComposerLVLM, data: StreamingCaptionDataset, where: str
) -> None:
    """Raise if a reference, which may be yet to be trained, lacks positions for conversations of the data."""
    own = recipe.helpers.get("reference")
    longest = data.max_tokens + (model.tokenizer.bos_token_id is None)  # Qwen's write no first one
    for name, given in recipe.algorithms.items():
        path = (given or {}).get("reference")
        if not path or not data.has_messages:
            continue
        with one_line_errors(f"{where}algorithms.{name}.reference={path}"):
            config: Any = None
            if own is not None and not Path(path).exists():
                skeleton = skeleton_of(own, model.tokenizer, f"{where}reference.")
                config = skeleton.model.config if isinstance(skeleton, ComposerLVLM) else None
            elif own is not None or not recipe.train_loader["dataset"].get("scores"):  # else it may be gone
                config = load_pretrained(AutoConfig, path)
            positions = config and getattr(config.get_text_config(), "max_position_embeddings", None)
            if positions is not None and longest > positions:
                raise ValueError(
                    f"it has {positions} positions, and a conversation may take {longest:,}: lower "
                    f"{where}train_loader.dataset.max_tokens."
                )


def _check_live_viewer(recipe: TrainConfig, model: ComposerLVLM, where: str) -> None:
    """Raise if a viewer is to score each batch and cannot read it; it may be yet to be trained."""
    dataset, own = recipe.train_loader["dataset"], recipe.helpers.get("viewer")
    for name, given in recipe.algorithms.items():
        viewer = (given or {}).get("viewer")
        if not viewer or dataset.get("viewer_scores"):
            continue
        with one_line_errors(f"{where}algorithms.{name}.viewer={viewer}"):
            if own is None or Path(viewer).exists():
                processor = load_processor(AutoProcessor, viewer)
            else:
                processor = getattr(skeleton_of(own, model.tokenizer, f"{where}viewer."), "processor", model.processor)
                processor.prompt = own.train_loader["dataset"].get("prompt", "")
            model.processor.prompt = dataset.get("prompt", "")
            check_processors(processor, model.processor)


def skeleton_of(recipe: TrainConfig, tokenizer: Any, where: str) -> Any:
    """Return the model without its weights, or a stand-in where a component from outside cannot be built so."""
    stand_in = SimpleNamespace(tokenizer=tokenizer, image_processor=lambda image: image)
    name = recipe.model["name"]
    if name not in SKELETONS:
        return stand_in
    config, reference = registry.without_name(recipe.model), recipe.reference_recipe
    language = config.get("language") or {}
    pretrained = language.get("pretrained")
    if reference is not None and pretrained is not None:
        folder = model_folder(reference)
        if Path(pretrained) == folder and not folder.exists():  # it starts from a reference that is yet to be trained
            config["language"] = {**language, "pretrained": None, "config": None, **reference.model["language"]}
    try:
        with one_line_errors(f"{where}model" if where else ""):
            return SKELETONS[name](tokenizer, **config)
    except StartError as error:
        if isinstance(error.__cause__, RuntimeError):  # a tower from outside that computes while it is built
            return stand_in
        raise


def _check_samples(where: str, loader: Any) -> None:
    """Raise if a data set gives no batch: Composer would wait for one for ever, or train on nothing."""
    if len(loader) == 0:
        key = f"{where.removesuffix('train_loader')}global_train_batch_size"
        workers = loader.dataset.workers  # 1 but for packed rows, of which each delivers as many batches
        first = f"{workers * loader.batch_size * loader.dataset.samples_per_row:g} of its first batch"
        if workers > 1:
            first, key = f"{first}es, one of each worker", f"{key} or {where}.num_workers"
        remedy = f"lower {key}" if where.endswith("train_loader") else f"set {where}.drop_last=false"
        raise ValueError(
            f"{where}: of {loader.dataset.num_samples} samples each rank gets {len(loader.dataset)}, fewer than the "
            f"{first}; {remedy}, or give more samples."
        )


def _check_stored_scores(path: str, data: StreamingCaptionDataset, column: str) -> None:
    """Raise if stored scores belong to other data, another tokenizer or other settings."""
    try:
        metadata = Scores(path, Path(path)).metadata
    except ScoresError as error:
        if is_denied(error):
            raise
        if is_remote(path):
            Remote(path).check_writable()
        return  # none, or not whole: they will be made
    metadata.check(ScoresMetadata.of(data, {}, column), path, reference=False)


def _check_same_data(recipe: TrainConfig, key: str, helper: TrainConfig, data: StreamingCaptionDataset) -> None:
    """Raise if the reference or viewer was or would be trained on other captions than the run."""
    if read_metadata(helper) is not None:
        check_helper(recipe, key, data.fingerprint)
        return
    dataset = {**helper.train_loader["dataset"], **dict.fromkeys(KEYS)}
    ours = recipe.train_loader["dataset"]
    if all(dataset.get(key) == ours.get(key) for key in ("remote", "local", "split", "streams")):
        return
    theirs = StreamingCaptionDataset(tokenizer=data.tokenizer, batch_size=1, **dataset)
    if theirs.fingerprint != data.fingerprint:
        raise ValueError(
            f"{key}.train_loader.dataset holds other data than train_loader.dataset: the {key} has to learn the "
            "captions of the run. Name the same data in both."
        )


def check_fit(model: ComposerLVLM, data: StreamingCaptionDataset, loader: str = "train_loader") -> None:
    """Raise if the language model lacks positions for the longest sequence of the data, or a packed row is shorter.

    Args:
        model: that reads the data.
        data: of a loader.
        loader: its key in the recipe, for the message.
    """
    processor: Any = data.image_processor
    if isinstance(processor, ProcessorInputs):  # its number of tokens may depend on the image
        prefix: Any = replace(processor, positions=None)(Image.new("RGB", (1024, 1024))).prefix
        image_tokens = len(prefix["input_ids"]) - 1 - len(data.prompt_ids)
    else:
        image_tokens = 0 if model.reads_text_alone else model.processor.image_processor.max_image_tokens
    longest = 1 + image_tokens + len(data.prompt_ids) + data.max_caption_tokens
    has_captions = any("messages" not in cast(Any, shard).column_names for shard in data.shards)
    if data.packing_ratio is not None and has_captions and longest > data.max_tokens:
        raise ValueError(
            f"A packed row has {data.max_tokens:,} tokens, and a caption with its image may take {longest:,}: raise "
            f"{loader}.dataset.max_tokens, or lower max_caption_tokens."
        )
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.has_messages and data.max_tokens > positions:
        raise ValueError(
            f"The language model has {positions} positions, and a conversation may take {data.max_tokens:,}: lower "
            f"{loader}.dataset.max_tokens."
        )
    if positions is not None and longest > positions:
        raise ValueError(
            f"The language model has {positions} positions, and a sequence may take {longest}: bos, {image_tokens} "
            f"image, {len(data.prompt_ids)} prompt and {data.max_caption_tokens} caption tokens; lower "
            f"{loader}.dataset.max_caption_tokens{_image_key(model, processor)}."
        )


def _image_key(model: ComposerLVLM, processor: Any) -> str:
    """Return the key of a recipe that decides how many tokens an image has, for a message."""
    if isinstance(processor, ProcessorInputs):
        return ", or the size of images in model.processor"
    if model.reads_text_alone:
        return ""
    tower: Any = model.model.config.vision
    keys = {"naflex": "max_tokens", "patches": "max_side"}
    return " or model.vision." + ("tiles.max" if "tiles" in tower else keys.get(tower.get("type"), "image_size"))


def _algorithms(recipe: TrainConfig, where: str) -> list[Any]:
    """Build the algorithms of a recipe, without the reference's weights."""
    built = []
    for name, arguments in without_models("algorithm", recipe.algorithms).items():
        with one_line_errors(f"{where}algorithms.{name}"):
            built += build_all("algorithm", {name: arguments})
    weighting_of(built)  # raises for two
    return built
