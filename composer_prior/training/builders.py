"""From the parts of a recipe to the objects of a run."""

from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Precision
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from composer_prior import registry
from composer_prior.models.build import lvlm_skeleton


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, parallelism: Mapping[str, Any] | None = None
) -> Any:
    """Build the model of a recipe; with FSDP2 only the first rank loads weights, and Composer sends them to the others.

    Args:
        config: the recipe's ``model``.
        tokenizer: of :func:`.build_tokenizer`.
        parallelism: the recipe's ``parallelism_config``.
    """
    if "fsdp2" in (parallelism or {}) and dist.get_global_rank() != 0 and config["name"] == "lvlm":
        try:
            return lvlm_skeleton(tokenizer, **registry.without_name(config))
        except RuntimeError:
            pass  # a tower from outside that computes while it is built
    return build_named("model", config, tokenizer=tokenizer)


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


def without_reference(kind: str, components: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's algorithms or benchmarks without a ``reference`` that is optional, so that none is loaded."""
    found: dict[str, Any] = {**components}
    for name, given in components.items():
        if given is not None and "reference" in given:
            constructor = registry.look_up(kind, given.get("benchmark", name), f"{kind}s.{name}")
            parameter = registry.parameters_of(constructor).get("reference")
            if parameter is None or parameter.default is not parameter.empty:
                found[name] = {key: value for key, value in given.items() if key != "reference"}
    return found


def build_precision(name: str) -> Precision:
    """Return a precision; ``auto`` is ``amp_bf16`` on CUDA, ``fp32`` on the CPU, where bf16 can be 100 times slower."""
    if name == "auto":
        return Precision.AMP_BF16 if torch.cuda.is_available() else Precision.FP32
    return Precision(name)
