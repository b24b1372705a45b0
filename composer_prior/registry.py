"""Named components that a recipe can ask for: one look-up, one constructor.

Code from outside adds its own with :func:`register`, and a recipe loads it through ``code_paths``.
"""

import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any

from composer_prior import signatures

Count = Annotated[int, "of at least 1"]
Whole = Annotated[int, "of at least 0"]
_FORMER = {"prior": "reference"}  # names that keys had before
_COMPONENTS: dict[str, dict[str, Callable[..., Any]]] = {}  # those registered
_SHIPPED = {  # beside Composer's algorithms, callbacks and loggers, which have their names in snake_case
    "algorithm": {
        "prior": "composer_prior.algorithms.prior.prior:PRIOR",
        "permuted_prior": "composer_prior.algorithms.permuted_prior.permuted_prior:PermutedPRIOR",
        "random_prior": "composer_prior.algorithms.random_prior.random_prior:RandomPRIOR",
        "oracle": "composer_prior.algorithms.oracle.oracle:Oracle",
        "rho1": "composer_prior.algorithms.rho1.rho1:Rho1",
        "cal": "composer_prior.algorithms.cal.cal:CAL",
        "dpa": "composer_prior.algorithms.dpa.dpa:DPA",
        "focal": "composer_prior.algorithms.focal.focal:Focal",
        "image_gain": "composer_prior.algorithms.image_gain.image_gain:ImageGain",
        "vig": "composer_prior.algorithms.vig.vig:VIG",
        "regate": "composer_prior.algorithms.regate.regate:ReGATE",
    },
    "benchmark": {
        "captioning": "composer_prior.evaluation.captioning:Captioning",
        "foils": "composer_prior.evaluation.foils:Foils",
        "hallucination": "composer_prior.evaluation.hallucination:Hallucination",
        "image_dependence": "composer_prior.evaluation.image_dependence:ImageDependence",
        "pope": "composer_prior.evaluation.pope:Pope",
        "scene_foils": "composer_prior.evaluation.scene_choices:SceneFoils",
        "scene_questions": "composer_prior.evaluation.scene_choices:SceneQuestions",
    },
    "callback": {
        "compute_monitor": "composer_prior.training.monitors:ComputeMonitor",
        "data_wait_monitor": "composer_prior.training.monitors:DataWaitMonitor",
        "hf_checkpointer": "composer_prior.training.saving:HuggingFaceCheckpointer",
        "lr_monitor": "composer_prior.training.monitors:GroupLRMonitor",
        "nan_monitor": "composer.callbacks:NaNMonitor",
        "plan_monitor": "composer_prior.training.monitors:PlanMonitor",
    },
    "data": {"emoji_scenes": "composer_prior.emoji_scenes.writing:make_emoji_scenes"},
    "logger": {
        "tensorboard": "composer_prior.training.loggers:TensorBoard",
        "tensorboard_logger": "composer_prior.training.loggers:TensorBoard",
        "wandb": "composer_prior.training.loggers:WandB",
        "wand_b_logger": "composer_prior.training.loggers:WandB",
        "mlflow": "composer_prior.training.loggers:MLFlow",
        "ml_flow_logger": "composer_prior.training.loggers:MLFlow",
    },
    "model": {
        "lvlm": "composer_prior.models.build:build_lvlm",
        "hugging_face": "composer_prior.models.hugging_face:build_hugging_face",
    },
    "optimizer": {
        "decoupled_adamw": "composer.optim:DecoupledAdamW",
        "decoupled_sgdw": "composer.optim:DecoupledSGDW",
        "adamw": "torch.optim:AdamW",
    },
    "scheduler": {
        "constant_with_warmup": "composer.optim:ConstantWithWarmupScheduler",
        "cosine_with_warmup": "composer.optim:CosineAnnealingWithWarmupScheduler",
        "linear_decay_with_warmup": "composer.optim:LinearWithWarmupScheduler",
        "multistep_with_warmup": "composer.optim:MultiStepWithWarmupScheduler",
        "polynomial_with_warmup": "composer.optim:PolynomialWithWarmupScheduler",
    },
    "vision": {
        "naflex": "composer_prior.models.vision:build_naflex",
        "open_clip": "composer_prior.models.vision:build_open_clip",
        "patches": "composer_prior.models.vision:build_patches",
    },
}


def register(kind: str, name: str) -> Callable[[Any], Any]:
    """Register the decorated constructor as ``name`` among the components of a kind."""

    def add(constructor: Any) -> Any:
        _COMPONENTS.setdefault(kind, {})[name] = constructor
        return constructor

    return add


def look_up(kind: str, name: str, where: str) -> Any:
    """Return the constructor of a name, or ``module:name`` of one whose module is not imported.

    Raises:
        ValueError: if there is none, naming ``where`` in the recipe and the nearest name.
    """
    if name in _COMPONENTS.get(kind, {}):
        return _COMPONENTS[kind][name]
    if name not in shipped(kind):
        raise ValueError(f"{where}={name!r} is not a known {kind}. {did_you_mean(name, names(kind))}")
    module, _, attribute = shipped(kind)[name].partition(":")
    return getattr(sys.modules.get(module), attribute, shipped(kind)[name])


def load(kind: str, name: str, where: str) -> Any:
    """Return the constructor of a name, whose module is imported."""
    constructor = look_up(kind, name, where)
    if isinstance(constructor, str):
        module, _, attribute = constructor.partition(":")
        constructor = getattr(import_module(module), attribute)
    return constructor


def names(kind: str) -> list[str]:
    """Return the names of a kind: those of this package, those of Composer, and those registered so far."""
    return [*{**shipped(kind), **_COMPONENTS.get(kind, {})}]


@cache
def shipped(kind: str) -> dict[str, str]:
    """Return the components that need no further code, ``module:name`` by name."""
    package = {"algorithm": "composer.algorithms", "callback": "composer.callbacks", "logger": "composer.loggers"}
    found = signatures.definitions(package[kind]) if kind in package else {}
    classes = [name for name in found if name[0].isupper() and name not in ("Logger", "LoggerDestination")]
    return {snake_case(name): f"{package[kind]}:{name}" for name in classes} | _SHIPPED.get(kind, {})


def snake_case(name: str) -> str:
    """Convert ``SpeedMonitor`` to ``speed_monitor``, ``LRMonitor`` to ``lr_monitor``, ``SAM`` to ``sam``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def check(
    kind: str,
    name: str,
    arguments: Mapping[str, Any],
    where: str,
    given: Collection[str] = (),
    beside: Collection[str] = (),
) -> None:
    """Check the arguments of a registered component, see :func:`check_arguments`.

    A constructor that needs weights or data may have a static method ``check``, which is called with those of the
    arguments that it takes, once the constructor is imported.
    """
    constructor = look_up(kind, name, f"{where}.name")
    check_arguments(constructor, arguments, where, name, given, beside)
    further = getattr(constructor, "check", None)
    if further is not None:
        try:
            further(**{key: arguments[key] for key in inspect.signature(further).parameters if key in arguments})
        except ValueError as error:
            said = str(error)
            parts = where.split(".")
            keys = [".".join(parts[start:]) for start in range(len(parts))]  # one of which a message may begin with
            key = next((key for key in keys if said.startswith(f"{key}.")), None)
            raise ValueError(f"{where}: {said}" if key is None else f"{where}{said.removeprefix(key)}") from error


def check_arguments(
    constructor: Any,
    arguments: Mapping[str, Any],
    where: str,
    name: str = "",
    given: Collection[str] = (),
    beside: Collection[str] = (),
) -> None:
    """Raise if a constructor does not have an argument, or if one is of the wrong type or missing.

    Args:
        constructor: a function or class, or ``module:name``, which is read from source.
        arguments: from the recipe.
        where: their place in the recipe, for the message.
        name: of the component, for the message. Default: ``where``.
        given: names of the arguments that the program itself will pass.
        beside: keys that stand beside the arguments there, for the message.

    Raises:
        ValueError: one line naming the key, what is accepted and the nearest valid key.
    """
    parameters = parameters_of(constructor)
    if "unknown" in parameters:
        return  # it is checked when it is imported
    accepted = [key for key in parameters if key not in given]
    for key, value in arguments.items():
        if key not in accepted:
            raise ValueError(
                f"{where}.{key} is not a key of {name or where}. {did_you_mean(key, [*accepted, *beside])}"
            )
        check_value(f"{where}.{key}", value, parameters[key].annotation)
    missing = [k for k in accepted if parameters[k].default is inspect.Parameter.empty and k not in arguments]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}.")


def check_value(where: str, value: Any, annotation: Any) -> None:
    """Raise for a value of a recipe or of a command that its annotation does not accept, naming ``where`` it is."""
    if not _accepts(annotation, value):
        expected = inspect.formatannotation(annotation)
        expected = re.sub(r"(?:typing\.)?Annotated\[(\w+), '([^']*)'\]", r"\1 \2", expected)
        expected = re.sub(r"list\[(?:typing\.)?Literal\[([^]]*)\]\]", r"a list of \1", expected)
        expected = re.sub(r"(?:typing\.)?Literal\[([^]]*)\]", r"one of \1", expected)
        expected = re.sub(r"^(?:typing\.)?Optional\[(.*)\]$", r"\1 | None", expected)
        if re.search(r"\.Time\b", expected):
            expected = "a time such as 500ba, 2ep or 0.1dur"
        raise ValueError(f"{where}={value!r}: expected {expected}.")


def is_time(value: Any, positive: bool = False) -> bool:
    """Return True if a value is one of Composer's times, such as ``500ba``, ``2ep`` or ``0.1dur``, or ``1h30m``.

    Composer itself takes a digit without a unit for ten times as many seconds.
    """
    clock = r"(?=\d)(?:(?:[01]?\d|2[0-3])h)?(?:[0-5]?\dm)?(?:[0-5]?\ds)?"
    found = re.fullmatch(rf"(\d*\.?\d+(?:e\+?\d+)?)(iter|ep|ba|sp|tok|sec|dur)|{clock}", str(value), re.IGNORECASE)
    if not found or found[1] is None:
        return bool(found)
    number = float(found[1])
    return (number > 0 or not positive) and (number.is_integer() or found[2].lower() == "dur")


def build(kind: str, name: str, arguments: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Check the recipe's arguments and call the constructor with them and with those given by the program."""
    check(kind, name, arguments, where, given)
    return load(kind, name, where)(**given, **arguments)


def without_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a component given as ``{name: ..., argument: ...}``."""
    return {key: value for key, value in config.items() if key != "name"}


def takes(constructor: Any, argument: str) -> bool:
    """Return True if a constructor has an argument of this name."""
    return argument in parameters_of(constructor)


def did_you_mean(name: str, accepted: Collection[str]) -> str:
    """Return a sentence that names the nearest of the accepted names, and all of them if they are few."""
    nearest = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.5)
    if _FORMER.get(name) in accepted:
        nearest = [_FORMER[name]]
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    if len(accepted) > (30 if nearest else 100):
        return hint.strip()
    return f"{hint}Accepted: {', '.join(sorted(accepted)) or 'none'}."


def parameters_of(constructor: Any) -> dict[str, inspect.Parameter]:
    """Return keyword parameters; where a class passes ``**kwargs`` on, those of its base classes too."""
    if isinstance(constructor, str):
        constructor = signatures.stub(constructor)
    functions: list[Any] = (
        [vars(c).get("__init__") for c in constructor.__mro__[:-1]] if isinstance(constructor, type) else [constructor]
    )
    parameters: dict[str, inspect.Parameter] = {}
    for function in filter(None, functions):
        hints = _type_hints(function)
        own = inspect.signature(function).parameters.values()
        for parameter in own:
            if parameter.name != "self" and parameter.kind in (
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.KEYWORD_ONLY,
            ):
                hint = hints.get(parameter.name, Any)
                parameters.setdefault(parameter.name, parameter.replace(annotation=hint))
        if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters


def _type_hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations under TYPE_CHECKING: their types are not checked
        return {}


def _accepts(annotation: Any, value: Any) -> bool:
    """Return True if a value from YAML fits an annotation; one that YAML cannot express accepts everything."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if any(_named(option, "Time") for option in options):
            options = tuple(option for option in options if option is not str)
        return any(_accepts(option, value) for option in options)
    if origin is Annotated:
        return _accepts(options[0], value) and value >= int(options[1].rpartition(" ")[2])
    if origin is typing.Literal:
        return value in options
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if origin is tuple:
        options = options[:1] * len(value) if options[1:] == (...,) and isinstance(value, list) else options
        return isinstance(value, list) and len(value) == len(options) and all(map(_accepts, options, value))
    if _named(annotation, "Time"):
        return isinstance(value, str) and is_time(value)
    if _named(annotation, "Tensor"):
        return False
    if (origin or annotation) in (dict, list, Mapping):
        fits = isinstance(value, origin or annotation)
        return fits and (origin is not list or all(_accepts(options[0], one) for one in value))
    return True


def _named(annotation: Any, name: str) -> bool:
    return getattr(annotation, "__name__", None) == name
