"""Refuses a recipe whose components do not exist or do not take what they are given."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.core import Precision, Time

from composer_prior import registry
from composer_prior.data.tokenizer import VOCAB_SIZES
from composer_prior.registry import did_you_mean
from composer_prior.training import components  # noqa: F401  registers them
from composer_prior.training.benchmarks import check_benchmarks
from composer_prior.training.config import TrainConfig
from composer_prior.training.optimizer import check_optimizer


def check_recipe(recipe: TrainConfig, where: str = "") -> None:
    """Refuse components that do not exist, arguments they do not have, and impossible values, naming the key.

    Args:
        recipe: a loaded recipe.
        where: prefix of its keys, for the recipe of a reference.
    """
    for key in ("max_duration", "eval_interval", "save_interval"):
        try:
            Time.from_timestring(getattr(recipe, key))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{where}{key}={getattr(recipe, key)!r}: expected a time such as 500ba, 2ep or 1dur."
            ) from error
    if not Path(recipe.run_name).parts or ".." in Path(recipe.run_name).parts:
        raise ValueError(f"{where}run_name={recipe.run_name}: it names a folder in runs/; leave out the dots.")
    precisions = ["auto", *(p.value for p in Precision)]
    if recipe.precision not in precisions:
        raise ValueError(f"{where}precision={recipe.precision!r}. {did_you_mean(recipe.precision, precisions)}")
    microbatch = recipe.device_train_microbatch_size
    if not (microbatch in (None, "auto") or (isinstance(microbatch, int) and microbatch > 0)):
        raise ValueError(f"{where}device_train_microbatch_size={microbatch!r}: expected a number of samples or auto.")
    if microbatch == "auto" and recipe.parallelism_config is not None:
        raise ValueError(
            f"{where}device_train_microbatch_size=auto: Composer finds no size by itself under "
            f"{where}parallelism_config; give a number of samples."
        )
    if "fsdp" in (recipe.parallelism_config or {}):
        raise ValueError(f"{where}parallelism_config.fsdp: FSDP1 is not supported; use fsdp2.")
    if recipe.init_from is not None and recipe.load_path is not None:
        raise ValueError(
            f"{where}init_from and {where}load_path are both given: load_path goes on with a run, init_from starts "
            "another from its weights."
        )
    if recipe.autoresume and recipe.save_folder is None:
        raise ValueError(f"{where}autoresume=true needs {where}save_folder, where the checkpoints are.")
    for key in ("save_folder", "load_path"):
        if "{" in (getattr(recipe, key) or ""):
            raise ValueError(f"{where}{key}={getattr(recipe, key)}: Composer's placeholders are not filled in here.")
    for key, least in (("global_train_batch_size", 1), ("device_eval_batch_size", 1), ("nan_steps", 0)):
        if getattr(recipe, key) < least:
            raise ValueError(f"{where}{key}={getattr(recipe, key)}: expected at least {least}.")
    if recipe.data is not None:
        check_named("data", recipe.data, f"{where}data")
    tokenizer_keys = ("name", "kwargs", "train")
    for key in recipe.tokenizer:
        if key not in tokenizer_keys:
            raise ValueError(f"{where}tokenizer.{key} is not a key. {did_you_mean(key, tokenizer_keys)}")
    size = (recipe.tokenizer.get("train") or {"vocab_size": VOCAB_SIZES[0]}).get("vocab_size")
    if not isinstance(size, int) or size not in VOCAB_SIZES:
        raise ValueError(
            f"{where}tokenizer.train.vocab_size={size!r}: expected {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]:,} tokens."
        )
    given = ("out", "reference", "tokenizer", "dataset", "progress_bar")
    registry.check("scoring", "captions", recipe.scoring, f"{where}scoring", given=given)
    check_named("model", recipe.model, f"{where}model", given=("tokenizer", "image_related_metrics"))
    for key in ("train_loader", "eval_loader"):
        if getattr(recipe, key) is not None:
            check_loader(getattr(recipe, key), f"{where}{key}")
    check_optimizer(recipe.optimizer, f"{where}optimizer")
    check_named("scheduler", recipe.scheduler, f"{where}scheduler")
    for kind in ("algorithm", "callback", "logger"):
        for name, arguments in getattr(recipe, f"{kind}s").items():
            if arguments is not None:
                registry.check(kind, name, arguments, f"{where}{kind}s.{name}")
    check_benchmarks(recipe.benchmarks, where)
    for name, arguments in (recipe.parallelism_config or {}).items():
        registry.check("parallelism", name, arguments, f"{where}parallelism_config.{name}")
    if recipe.reference is not None:
        check_recipe(TrainConfig(**recipe.reference), "reference.")


def check_named(kind: str, config: Mapping[str, Any], where: str, given: Sequence[str] = ()) -> None:
    """Check a component given as ``{name: ..., argument: ...}``."""
    if "name" not in config:
        raise ValueError(f"{where} needs a name.")
    registry.check(kind, config["name"], {k: v for k, v in config.items() if k != "name"}, where, given)


def check_loader(config: Mapping[str, Any], where: str) -> None:
    """Check a loader: ``dataset`` and the arguments of torch's DataLoader."""
    arguments = {key: value for key, value in config.items() if key != "dataset"}
    registry.check(
        "loader",
        "captions",
        arguments,
        where,
        given=("dataset", "batch_size", "collate_fn", "sampler", "batch_sampler"),
    )
    dataset = config.get("dataset") or {}
    registry.check(
        "dataset",
        "captions",
        dataset,
        f"{where}.dataset",
        given=(
            "tokenizer",
            "image_processor",
            "transform",
            "batch_size",
            "allow_unsafe_types",
            "stream_name",
            "stream_config",
        ),
    )
    for name, stream in (dataset.get("streams") or {}).items():
        if not isinstance(stream, Mapping):
            raise ValueError(f"{where}.dataset.streams.{name}={stream!r}: expected keys such as remote and local.")
        registry.check("stream", "stream", stream, f"{where}.dataset.streams.{name}")
