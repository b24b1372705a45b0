"""The optimizer of a recipe: weights in groups with settings of their own, and no weight decay where it does harm."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from composer.algorithms import Factorize, SqueezeExcite
from composer.core import Algorithm
from torch import nn
from torch.optim import Optimizer

from composer_prior import registry
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.language import named_weights
from composer_prior.registry import did_you_mean
from composer_prior.training.keys import GroupSettings, settings_of

NO_GROUP = "group0"  # Composer's name of an optimizer's first group
_UNDECAYED = re.compile("bias|embed|token")  # in the own name of a weight, as of ViTs' positional_embedding, cls_token


def build_optimizer(config: Mapping[str, Any], model: nn.Module, where: str = "optimizer") -> Optimizer:
    """Build the optimizer of a model's trained weights, in torch's parameter groups.

    Args:
        config: ``name`` and arguments of the optimizer; ``groups``, by prefix of the weights' names arguments of their
            own (``vision``, ``projector``, ``language``, ``language.lm_head``); ``decay_all``, to let weight decay act
            on norms, biases and embeddings too, which it otherwise passes over.
        model: a Composer model, also on the meta device.
        where: place in the recipe. Default: ``"optimizer"``.

    Raises:
        ValueError: naming a group without a weight to train, or an argument that is none of a group.
    """
    settings = settings_of(config, where)
    decays = registry.takes(registry.look_up("optimizer", config["name"], f"{where}.name"), "weight_decay")
    groups = _weights_in_groups(settings, model, spare=decays and not config.get("decay_all", False))
    optimizer = registry.build("optimizer", config["name"], settings[0].arguments, where, params=groups)
    for _, place, arguments in settings[1:]:
        for key in arguments:
            if key not in settings[0].arguments and key not in optimizer.defaults:
                raise ValueError(f"{place}.{key}: {config['name']} takes it for all weights alike; give {where}.{key}.")
    return optimizer


def _weights_in_groups(settings: list[GroupSettings], model: nn.Module, spare: bool) -> list[dict[str, Any]]:
    """Put each trained weight in one group, of the longest prefix of its names; a tied weight has several names.

    With ``spare`` norms, biases and embeddings have no weight decay.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in _named_weights(model):
        names.setdefault(weight, []).append(name)
    trained = {weight: own for weight, own in names.items() if weight.requires_grad}
    if not trained:
        raise ValueError("Nothing to train: vision, projector and language are all frozen.")
    for prefix, where, _ in settings[1:]:
        if not any(_begins(name, prefix) for own in trained.values() for name in own):
            raise ValueError(f"{where}: {_why_none(prefix, [name for own in names.values() for name in own])}")
    undecayed = _undecayed(model) if spare else set()
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for weight, own in trained.items():
        of_weight = [one for one in settings[1:] if any(_begins(name, one.prefix) for name in own)]
        for one, other in pairwise(of_weight):
            if not _begins(other.prefix, one.prefix):
                tied = " and ".join(own)
                raise ValueError(f"{one.where} and {other.prefix} name one weight, for {tied} are tied.")
        prefix, _, arguments = of_weight[-1] if of_weight else settings[0]
        spared = weight in undecayed and arguments.get("weight_decay") != 0
        group = {**arguments, **({"weight_decay": 0.0} if spared else {}), "name": prefix or NO_GROUP, "params": []}
        groups.setdefault((prefix, spared), group)["params"].append(weight)
    return list(groups.values())


def _named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights by the names that recipes use, a tied one several times."""
    if isinstance(model, ComposerLVLM):
        yield from named_weights(model.model)
        return
    for name, weight in model.named_parameters(remove_duplicate=False):
        yield name.removeprefix("model."), weight


def _begins(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")


def _why_none(prefix: str, names: list[str]) -> str:
    """Explain why a prefix matches no trained weight."""
    if any(_begins(name, prefix) for name in names):
        return f"every weight of {prefix} is frozen; train it, or leave the group out."
    parts = prefix.split(".")
    known = [".".join(parts[:count]) for count in range(len(parts))]
    parent = next(one for one in reversed(known) if not one or any(_begins(name, one) for name in names))
    depth = len(parent.split(".")) + 1 if parent else 1
    there = {".".join(name.split(".")[:depth]) for name in names if not parent or _begins(name, parent)}
    return f"no weight's name begins so. {did_you_mean(prefix, there)}"


def _undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Return norms, biases and embeddings: vectors, and tables, which a tied head shares."""
    tables = {table for part in model.modules() if isinstance(part, nn.Embedding) for table in part.parameters(False)}
    return tables | {
        weight
        for name, weight in model.named_parameters()
        if sum(side > 1 for side in weight.shape) < 2 or _UNDECAYED.search(name.rpartition(".")[2])
    }


def check_new_weights(algorithms: Sequence[Algorithm], optimizer: Optimizer, where: str = "") -> None:
    """Raise if an algorithm makes new weights beside several groups: Composer would find no group for them."""
    for algorithm in algorithms:
        if isinstance(algorithm, Factorize | SqueezeExcite) and len(optimizer.param_groups) > 1:
            raise ValueError(
                f"{where}algorithms: {type(algorithm).__name__} makes new weights, which are in no group of "
                f"{where}optimizer; set its decay_all=true and leave its groups out."
            )
