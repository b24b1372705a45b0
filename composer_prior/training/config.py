"""Recipes: YAML files with dot-list overrides, checked before anything heavy starts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from composer.core import Precision, Time
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_prior import registry
from composer_prior.registry import did_you_mean
from composer_prior.training import components  # noqa: F401  registers them


@dataclass
class TrainConfig:
    """The keys of a recipe; those that LLM Foundry has are named and mean what they do there."""

    run_name: str = MISSING
    run_folder: str = "runs/${run_name}"  # everything the run writes
    seed: int = 17
    max_duration: str = MISSING
    global_train_batch_size: int = MISSING  # samples of one optimizer step, over all ranks
    device_train_microbatch_size: Any = None  # samples; null: those of the rank at once; auto: CUDA without fsdp2
    device_eval_batch_size: int = 64
    precision: str = "auto"  # amp_bf16 on CUDA, fp32 on the CPU
    data: dict[str, Any] | None = None  # what makes the data if they are missing: a `name` and its arguments, or a file
    tokenizer: dict[str, Any] = MISSING  # name: hub id or folder; train: {vocab_size} makes it if missing
    reference: dict[str, Any] | None = None  # the recipe of the text-only reference, trained first if missing
    model: dict[str, Any] = MISSING
    train_loader: dict[str, Any] = MISSING
    eval_loader: dict[str, Any] | None = None
    eval_interval: str = "1dur"
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    algorithms: dict[str, Any] = field(default_factory=dict)  # name: arguments, in their order; null leaves one out
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)
    save_folder: str | None = "${run_folder}/checkpoints"  # null: no checkpoints
    save_interval: str = "1000ba"
    save_num_checkpoints_to_keep: int = 2
    load_path: str | None = None  # a checkpoint of this run, to go on from
    init_from: str | None = None  # a run folder, checkpoint or model folder whose weights a new run starts from
    autoresume: bool = False
    parallelism_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None  # arguments of torch.compile, such as {dynamic: true}
    code_paths: list[str] = field(default_factory=list)  # Python files to run first, which register components
    progress_bar: bool = True
    sample_captions: int = 4  # validation images captioned at the end
    dist_timeout: float = 3600.0  # seconds that ranks wait for each other, also while data are being made


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, put in the recipes it names (``data``, ``reference``) and the overrides, and check its schema.

    The reference's ``data`` and ``tokenizer`` are those of the run. Paths of recipes are relative to the file that
    names them; ``reference.key=value`` overrides the reference's recipe.

    Raises:
        FileNotFoundError: if a recipe is missing.
        ValueError: for an unknown key or a value of the wrong type, naming the key.
    """
    path = Path(path)
    recipe = _read(path)
    changes = _parse_overrides(overrides)
    data = _included(recipe.pop("data", None), changes.pop("data", {}), path)
    reference = _included(recipe.pop("reference", None), changes.pop("reference", {}), path)
    recipe = cast(DictConfig, OmegaConf.merge(recipe, changes, {"data": data}))
    if reference is not None:
        nested = OmegaConf.merge(reference, {"data": data, "tokenizer": recipe.get("tokenizer")})
        recipe["reference"] = asdict(_typed(cast(DictConfig, nested), path))
    return _typed(recipe, path)


def _included(value: Any, changes: Any, path: Path) -> Any:
    """A part of a recipe that may stand in a file of its own, with the overrides; null leaves it out."""
    if isinstance(changes, str):
        value, changes = changes, {}
    if value is None or changes is None:
        return None
    return OmegaConf.merge(_read(path.parent / value) if isinstance(value, str) else value, changes)


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"The recipe {path} does not exist.")
    try:
        recipe = OmegaConf.load(path)  # a safe loader: tags that construct Python objects are errors
    except Exception as error:
        raise ValueError(f"{path} is not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(recipe, DictConfig):
        raise ValueError(f"{path} must hold keys and values.")
    return recipe


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is not an override; write key=value.")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise ValueError(f"Overrides {' '.join(overrides)}: {_one_line(error)}") from error


def _typed(recipe: DictConfig, path: Path) -> TrainConfig:
    names = [f.name for f in fields(TrainConfig)]
    for key in map(str, recipe):
        if key not in names:
            raise ValueError(f"{path}: {key} is not a key of a recipe. {did_you_mean(key, names)}")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(TrainConfig), recipe)
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}.")
        return cast(TrainConfig, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key or ''!s}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


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
    for key in ("global_train_batch_size", "device_eval_batch_size"):
        if getattr(recipe, key) < 1:
            raise ValueError(f"{where}{key}={getattr(recipe, key)}: expected at least 1.")
    if recipe.data is not None:
        check_named("data", recipe.data, f"{where}data")
    tokenizer_keys = ("name", "kwargs", "train")
    for key in recipe.tokenizer:
        if key not in tokenizer_keys:
            raise ValueError(f"{where}tokenizer.{key} is not a key. {did_you_mean(key, tokenizer_keys)}")
    check_named("model", recipe.model, f"{where}model", given=("tokenizer", "image_related_metrics"))
    for key in ("train_loader", "eval_loader"):
        if getattr(recipe, key) is not None:
            check_loader(getattr(recipe, key), f"{where}{key}")
    check_named("optimizer", recipe.optimizer, f"{where}optimizer", given=("params",))
    check_named("scheduler", recipe.scheduler, f"{where}scheduler")
    for kind in ("algorithm", "callback", "logger"):
        for name, arguments in getattr(recipe, f"{kind}s").items():
            if arguments is not None:
                registry.check(kind, name, arguments, f"{where}{kind}s.{name}")
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
