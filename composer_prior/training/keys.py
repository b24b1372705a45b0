"""Checks of a recipe's keys: components that exist, arguments that they take, values that are possible.

They need neither Composer nor torch: the arguments of a component that is not imported are read from its source.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from composer_prior import registry, signatures
from composer_prior.registry import did_you_mean, is_time
from composer_prior.training.config import TrainConfig

_OURS = ("groups", "decay_all")  # keys that are not the optimizer's
_EXAMPLE = "{vision: {lr: 1.0e-5}}"
_RUNS = ("benchmark", "interval", "limit")  # keys that are not the benchmark's
VOCAB_SIZES = signatures.stub("composer_prior.data.tokenizer:VOCAB_SIZES")  # that module imports transformers
_SCORE_JOB = "composer_prior.scoring.job:ScoreJob"
_OF_THE_RECIPE = ("out", "reference", "viewer", "tokenizer", "dataset", "progress_bar")  # fields that the recipe gives
_SHARDING = "composer_prior.models.sharding:ShardingConfig"
_LANGUAGE = "composer_prior.models.language:build_language_model"
_LORA = "composer_prior.models.lora:add_lora"
_PROJECTOR = "composer_prior.models.build:projector_options"
_LOADER = "streaming:StreamingDataLoader"
_LOADER_GIVEN = ("dataset", "batch_size", "collate_fn", "sampler", "batch_sampler")
_DATASET = "composer_prior.data.captions:StreamingCaptionDataset"
_DATASET_GIVEN = (
    "tokenizer",
    "image_processor",
    "transform",
    "batch_size",
    "allow_unsafe_types",
    "stream_name",
    "stream_config",
)
_STREAM = "composer_prior.data.streams:CheckedStream"
_PRECISIONS = ("auto", "fp32", "amp_fp16", "amp_bf16", "amp_fp8")


def check_keys(recipe: TrainConfig, where: str = "") -> None:
    """Raise for components that do not exist, arguments that they do not have, and impossible values, naming the key.

    Args:
        recipe: a loaded recipe.
        where: prefix of its keys, for the recipe of a reference.
    """
    for key in ("max_duration", "eval_interval", "save_interval"):
        if not is_time(getattr(recipe, key), positive=True):
            raise ValueError(f"{where}{key}={getattr(recipe, key)!r}: expected a time such as 500ba, 2ep or 1dur.")
    if not Path(recipe.run_name).parts or ".." in Path(recipe.run_name).parts:
        raise ValueError(f"{where}run_name={recipe.run_name}: it names a folder in runs/; leave out the dots.")
    if recipe.precision not in _PRECISIONS:
        raise ValueError(f"{where}precision={recipe.precision!r}. {did_you_mean(recipe.precision, _PRECISIONS)}")
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
    least = {"global_train_batch_size": 1, "device_eval_batch_size": 1, "sample_captions": 0}
    least |= {"dist_timeout": 1, "nan_steps": 0}
    for key, bound in least.items():
        if getattr(recipe, key) < bound:
            raise ValueError(f"{where}{key}={getattr(recipe, key)}: expected at least {bound}.")
    if recipe.save_num_checkpoints_to_keep < 1 and recipe.save_num_checkpoints_to_keep != -1:
        kept = f"{where}save_num_checkpoints_to_keep={recipe.save_num_checkpoints_to_keep}"
        raise ValueError(f"{kept}: expected at least 1, or -1 for all.")
    if recipe.data is not None:
        check_named("data", recipe.data, f"{where}data")
    tokenizer_keys = ("name", "kwargs", "train", "image_tokens", "chat_template")
    for key in recipe.tokenizer:
        if key not in tokenizer_keys:
            raise ValueError(f"{where}tokenizer.{key} is not a key. {did_you_mean(key, tokenizer_keys)}")
    size = (recipe.tokenizer.get("train") or {"vocab_size": VOCAB_SIZES[0]}).get("vocab_size")
    if not isinstance(size, int) or size not in VOCAB_SIZES:
        raise ValueError(
            f"{where}tokenizer.train.vocab_size={size!r}: expected {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]:,} tokens."
        )
    if recipe.model.get("name") == "hugging_face":
        if not (recipe.model.get("pretrained") or (recipe.model.get("processor") or {}).get("name")):
            raise ValueError(
                f"{where}model.pretrained is missing: give a folder or hub id, or {where}model.config and "
                f"{where}model.processor.name for a new model."
            )
        if recipe.tokenizer.get("train"):
            raise ValueError(f"{where}tokenizer.train: hugging_face has its processor's tokenizer; leave the key out.")
    registry.check_arguments(_SCORE_JOB, recipe.scoring, f"{where}scoring", given=_OF_THE_RECIPE)
    check_named("model", recipe.model, f"{where}model", given=("tokenizer", "image_related_metrics"))
    if recipe.model["name"] == "lvlm":
        _check_lvlm(recipe.model, where)
    for key, part in (("model.language", recipe.model.get("language") or {}), ("model", recipe.model)):
        if (lora := part.get("lora")) is not None:
            registry.check_arguments(_LORA, lora, f"{where}{key}.lora", given=("model",))
    for key, loader in recipe.loaders.items():
        check_loader(loader, f"{where}{key}")
        if (loader.get("dataset") or {}).get("packing_ratio") is not None:
            _check_packing(recipe, key, where)
    check_optimizer(recipe.optimizer, f"{where}optimizer")
    check_named("scheduler", recipe.scheduler, f"{where}scheduler")
    for kind in ("algorithm", "callback", "logger"):
        for name, arguments in getattr(recipe, f"{kind}s").items():
            if arguments is not None:
                registry.check(kind, name, arguments, f"{where}{kind}s.{name}", given=("recipe", "run_id"))
    _check_sources(recipe, where)
    check_benchmarks(recipe.benchmarks, where)
    for name, arguments in (recipe.parallelism_config or {}).items():
        if name != "fsdp2":
            raise ValueError(f"{where}parallelism_config.{name} is not a key. {did_you_mean(name, ['fsdp2'])}")
        registry.check_arguments(_SHARDING, arguments, f"{where}parallelism_config.fsdp2")
    for key, helper in recipe.helpers.items():
        kinds = helper.model["name"], recipe.model["name"]
        if key == "viewer" and {*kinds} == {"lvlm", "hugging_face"}:
            raise ValueError(
                f"{where}viewer.model.name={kinds[0]} reads no batches of {where}model.name={kinds[1]}: name a recipe "
                f"of {kinds[1]}, or store the scores of a trained model first: composer-prior score ... viewer=MODEL."
            )
        check_keys(helper, f"{where}{key}.")


def _check_packing(recipe: TrainConfig, key: str, where: str) -> None:
    """Raise for packed rows where the model pads each sample of them, or where each sample must count once."""
    place = f"{where}{key}.dataset.packing_ratio"
    if key != "train_loader":
        raise ValueError(f"{place}: rows are for training alone; {where}model.pack packs batches of a validation.")
    if recipe.model.get("name") == "hugging_face":
        raise ValueError(f"{place}: {where}model.name=hugging_face has no pack, it pads each sample; leave it out.")
    if not recipe.model.get("pack"):
        raise ValueError(f"{place} needs {where}model.pack=true; without it the model pads each sample of a row.")


def _check_sources(recipe: TrainConfig, where: str) -> None:
    """Raise for a weighting without the log-probabilities that it needs, or with those of another model."""
    dataset = recipe.train_loader.get("dataset") or {}
    for name, given in recipe.algorithms.items():
        place = registry.shipped("algorithm").get(name, "")
        if given is None or not place.startswith("composer_prior"):
            continue
        for model, key in (("reference", "scores"), ("viewer", "viewer_scores")):
            if model not in registry.parameters_of(registry.look_up("algorithm", name, where)):
                continue
            if model == "reference" and given.get("over") == "model":
                if given.get("reference") is not None:
                    raise ValueError(
                        f"{where}algorithms.{name}.over=model compares with the trained model itself: set "
                        f"{where}algorithms.{name}.reference=null."
                    )
            elif not given.get(model) and not dataset.get(key):
                raise ValueError(
                    f"{where}algorithms.{name} needs the log-probabilities of a {model}: give {model}, or "
                    f"{where}train_loader.dataset.{key}."
                )
        viewer, own = given.get("viewer"), recipe.helpers.get("viewer")
        if viewer and own is not None and Path(viewer) != Path(own.run_folder, "model"):
            raise ValueError(
                f"{where}algorithms.{name}.viewer={viewer} is not the model of the recipe's viewer, "
                f"{own.run_folder}/model: set {where}viewer=null, and other {where}train_loader.dataset.viewer_scores."
            )


def _check_lvlm(model: Mapping[str, Any], where: str) -> None:
    vision, projector = model.get("vision"), model.get("projector")
    if vision is not None:
        check_named("vision", vision, f"{where}model.vision", given=("width",))
    elif projector is not None:
        raise ValueError(f"{where}model.projector is given without model.vision; set it to null.")
    registry.check_arguments(_LANGUAGE, model["language"], f"{where}model.language", given=("tokenizer",))
    if projector is not None:
        registry.check_arguments(_PROJECTOR, projector, f"{where}model.projector")


def check_named(kind: str, config: Mapping[str, Any], where: str, given: Sequence[str] = ()) -> None:
    """Check a component given as ``{name: ..., argument: ...}``."""
    if "name" not in config:
        raise ValueError(f"{where} needs a name.")
    registry.check(kind, config["name"], registry.without_name(config), where, given)


def check_loader(config: Mapping[str, Any], where: str) -> None:
    """Check a loader: ``dataset`` and the arguments of torch's DataLoader."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}={config!r}: expected a loader with its dataset.")
    arguments = {key: value for key, value in config.items() if key != "dataset"}
    registry.check_arguments(_LOADER, arguments, where, given=_LOADER_GIVEN)
    dataset = config.get("dataset") or {}
    registry.check_arguments(_DATASET, dataset, f"{where}.dataset", given=_DATASET_GIVEN)
    for name, stream in (dataset.get("streams") or {}).items():
        if not isinstance(stream, Mapping):
            raise ValueError(f"{where}.dataset.streams.{name}={stream!r}: expected keys such as remote and local.")
        registry.check_arguments(_STREAM, stream, f"{where}.dataset.streams.{name}")


def check_benchmarks(benchmarks: Mapping[str, Any], where: str = "") -> None:
    """Raise for benchmarks that do not exist, and for arguments that they do not take."""
    for name, arguments in benchmarks.items():
        if arguments is None:
            continue
        key = f"{where}benchmarks.{name}"
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{key}={arguments!r}: expected arguments of the benchmark, or null.")
        limit, interval = arguments.get("limit"), arguments.get("interval", "1dur")
        if limit is not None and not (isinstance(limit, int) and limit > 0):
            raise ValueError(f"{key}.limit={limit!r}: expected a number of samples.")
        if not is_time(interval, positive=True):
            raise ValueError(f"{key}.interval={interval!r}: expected a time such as 500ba or 1dur.")
        registry.check("benchmark", arguments.get("benchmark", name), benchmark_arguments(arguments), key)


def benchmark_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a benchmark's constructor, without those of the run."""
    return {key: value for key, value in given.items() if key not in _RUNS}


class GroupSettings(NamedTuple):
    """The optimizer's arguments for the weights whose names begin with ``prefix``, empty for those of no group.

    A group inherits missing values from the group with a shorter prefix, or from the optimizer.
    """

    prefix: str
    where: str
    arguments: dict[str, Any]


def settings_of(config: Mapping[str, Any], where: str) -> list[GroupSettings]:
    """Return the settings of each group of weights, those of no group first, then the shorter prefixes."""
    settings = [GroupSettings("", where, {key: config[key] for key in config if key not in ("name", *_OURS)})]
    groups = config.get("groups") or {}
    if not isinstance(groups, Mapping):
        raise ValueError(f"{where}.groups={groups!r}: expected arguments by prefix, such as {_EXAMPLE}.")
    for prefix, changes in sorted(_flat(groups, f"{where}.groups"), key=lambda group: len(group[0])):
        if prefix in (one.prefix for one in settings):
            raise ValueError(f"{where}.groups names {prefix} twice, with dots and as keys in each other.")
        outer = [one for one in settings if not one.prefix or f"{prefix}.".startswith(f"{one.prefix}.")][-1]
        settings.append(GroupSettings(prefix, f"{where}.groups.{prefix}", {**outer.arguments, **changes}))
    return settings


def _flat(groups: Mapping[str, Any], where: str, parent: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield for ``{"a": {"lr": 1, "b": {"lr": 2}}}`` ``("a", {"lr": 1})`` and ``("a.b", {"lr": 2})``."""
    for name, content in groups.items():
        prefix = f"{parent}{name}"
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}.{prefix}={content!r}: expected arguments such as {{lr: 1.0e-5}}.")
        deeper = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        if len(deeper) < len(content) or not content:
            yield prefix, {key: value for key, value in content.items() if key not in deeper}
        yield from _flat(deeper, where, f"{prefix}.")


def check_optimizer(config: Mapping[str, Any], where: str) -> None:
    """Raise for keys that the optimizer of a recipe does not take, for all weights or for a group, and wrong types."""
    if "name" not in config:
        raise ValueError(f"{where} needs a name.")
    if not isinstance(config.get("decay_all", False), bool):
        raise ValueError(f"{where}.decay_all={config['decay_all']!r}: expected bool.")
    for prefix, place, arguments in settings_of(config, where):
        registry.check("optimizer", config["name"], arguments, place, ("params",), () if prefix else _OURS)
