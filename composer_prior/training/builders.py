"""From the parts of a recipe to the objects of a run, and the errors of their libraries as one line."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import metadata
from typing import Any

import torch
from composer.core import Precision
from composer.profiler import JSONTraceHandler, Profiler, cyclic_schedule
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from composer_prior import registry
from composer_prior.data.captions import StreamingCaptionDataset, caption_data_spec
from composer_prior.data.messages import OneLineError, one_line
from composer_prior.data.scores import KEYS
from composer_prior.data.storage import StorageError
from composer_prior.models.build import lvlm_skeleton
from composer_prior.models.hugging_face import hugging_face_skeleton
from composer_prior.training.config import TrainConfig

SKELETONS: dict[str, Any] = {"lvlm": lvlm_skeleton, "hugging_face": hugging_face_skeleton}  # on the meta device


class StartError(ValueError):
    """A library's error at the start of a run, as one line."""


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


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, parallelism: Mapping[str, Any] | None = None
) -> Any:
    """Build the model of a recipe; with FSDP2 only the first rank loads weights, and Composer sends them to the others.

    Args:
        config: the recipe's ``model``.
        tokenizer: of :func:`.build_tokenizer`.
        parallelism: the recipe's ``parallelism_config``.
    """
    if "fsdp2" in (parallelism or {}) and dist.get_global_rank() != 0 and config["name"] in SKELETONS:
        try:
            return SKELETONS[config["name"]](tokenizer, **registry.without_name(config))
        except RuntimeError:
            pass  # a tower from outside that computes while it is built
    return build_named("model", config, tokenizer=tokenizer)


def build_profiler(recipe: TrainConfig) -> Profiler | None:
    """Build Composer's profiler of a recipe; its files stay in the run's folder."""
    if recipe.profiler is None:
        return None
    folder = f"{recipe.run_folder}/profiler"
    return Profiler(
        cyclic_schedule(**recipe.profiler),
        [JSONTraceHandler(folder, remote_file_name=None, merged_trace_remote_file_name=None, overwrite=True)],
        sys_prof_cpu=False,
        torch_prof_folder=folder,
        torch_prof_remote_file_name=None,
        torch_prof_memory_remote_file_name=None,
        torch_prof_overwrite=True,
    )


def trusts_code(recipe: TrainConfig) -> bool:
    """Return True if a recipe lets code run that comes with its model."""
    return any((part or {}).get("trust_remote_code") for part in (recipe.model, recipe.model.get("language")))


def build_named(kind: str, config: Mapping[str, Any], **given: Any) -> Any:
    """Build a component given as ``{name: ..., argument: ...}``."""
    return registry.build(kind, config["name"], registry.without_name(config), kind, **given)


def build_all(kind: str, configs: Mapping[str, Any], **given: Any) -> list[Any]:
    """Build components given as ``{name: {argument: ...}}``, in order, without those whose arguments are None.

    Args:
        kind: of the components.
        configs: their arguments by name.
        given: arguments of the program, for the components that take them.
    """
    built = []
    for name, arguments in configs.items():
        if arguments is not None:
            where = f"{kind}s.{name}"
            constructor = registry.look_up(kind, name, where)
            taken = {key: value for key, value in given.items() if registry.takes(constructor, key)}
            built.append(registry.build(kind, name, arguments, where, **taken))
    return built


def without_models(
    kind: str, components: Mapping[str, Any], models: Collection[str] = ("reference", "viewer")
) -> dict[str, Any]:
    """Return a recipe's algorithms or benchmarks without optional models, so that none is loaded.

    Args:
        kind: of the components.
        components: their arguments by name.
        models: names of the arguments to leave out.
    """
    found: dict[str, Any] = {**components}
    for name, given in components.items():
        for model in set(models) & {*(given or {})}:
            constructor = registry.look_up(kind, given.get("benchmark", name), f"{kind}s.{name}")
            parameter = registry.parameters_of(constructor).get(model)
            if parameter is None or parameter.default is not parameter.empty:
                found[name] = {key: value for key, value in found[name].items() if key != model}
    return found


def build_precision(name: str) -> Precision:
    """Return a precision; ``auto`` is ``amp_bf16`` on CUDA, ``fp32`` on the CPU, where bf16 can be 100 times slower."""
    if name == "auto":
        return Precision.AMP_BF16 if torch.cuda.is_available() else Precision.FP32
    return Precision(name)


def build_loaders(recipe: TrainConfig, model: Any, scores: bool = True, where: str = "") -> dict[str, Any]:
    """Build the loaders of a recipe, by their keys.

    Args:
        recipe: of the run.
        model: whose tokenizer and image processor they use.
        scores: let samples carry the stored scores that the recipe names.
        where: prefix of the recipe's keys, for messages.
    """
    loaders = {}
    for name, config in recipe.loaders.items():
        if not config.get("dataset"):
            raise ValueError(f"{where}{name}.dataset is missing: give it, or validation= beside train=.")
        trains = name == "train_loader"
        batch_size = per_rank_batch_size(recipe.global_train_batch_size) if trains else recipe.device_eval_batch_size
        loader = {"drop_last": trains, **config}
        dataset = {"shuffle_seed": recipe.seed, **loader.pop("dataset")}
        if not scores:
            dataset |= dict.fromkeys(KEYS)
        with one_line_errors(f"{where}{name}"):
            data = StreamingCaptionDataset(
                tokenizer=model.tokenizer,
                image_processor=getattr(model, "image_processor", None),
                batch_size=batch_size,
                **dataset,
            )
            loaders[name] = caption_data_spec(data, batch_size, **loader)
    return loaders


def per_rank_batch_size(global_batch_size: int, where: str = "") -> int:
    """Return the samples per rank of a step; raise if the ranks cannot share them evenly."""
    ranks = dist.get_world_size()
    if global_batch_size % ranks:
        raise ValueError(
            f"{where}global_train_batch_size={global_batch_size} cannot be shared evenly by {ranks} ranks."
        )
    return global_batch_size // ranks
