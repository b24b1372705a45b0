"""The optimizer of a recipe: weights in groups with settings of their own, and no weight decay where it does harm."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from composer.algorithms import Factorize, SqueezeExcite
from composer.callbacks import LRMonitor
from composer.core import Algorithm, State
from composer.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from composer_prior import registry
from composer_prior.registry import did_you_mean

_OURS = ("groups", "decay_all")  # keys that are not the optimizer's
_EXAMPLE = "{vision: {lr: 1.0e-5}}"
_NO_GROUP = "group0"  # Composer's name of an optimizer's first group
_UNDECAYED = re.compile("bias|embed|token")  # in the own name of a weight, as of ViTs' positional_embedding, cls_token


class GroupSettings(NamedTuple):
    """The optimizer's arguments for some weights.

    Args:
        prefix: of the weights' names; empty for those of no group.
        where: their place in the recipe.
        arguments: what a group does not say is that of the group with a shorter prefix, or the optimizer's.
    """

    prefix: str
    where: str
    arguments: dict[str, Any]


def settings_of(config: Mapping[str, Any], where: str) -> list[GroupSettings]:
    """What a recipe says for each group of weights, those of no group first, then the shorter prefixes.

    Args:
        config: see :func:`build_optimizer`.
        where: its place in the recipe.

    Raises:
        ValueError: for groups that are none.
    """
    settings = [GroupSettings("", where, {key: config[key] for key in config if key not in ("name", *_OURS)})]
    groups = config.get("groups") or {}
    if not isinstance(groups, Mapping):
        raise ValueError(f"{where}.groups={groups!r}: expected arguments by prefix, such as {_EXAMPLE}.")
    for prefix, changes in sorted(_flat(groups, f"{where}.groups"), key=lambda group: len(group[0])):
        if prefix in (one.prefix for one in settings):
            raise ValueError(f"{where}.groups names {prefix} twice, with dots and as keys in each other.")
        outer = [one for one in settings if not one.prefix or _begins(prefix, one.prefix)][-1]
        settings.append(GroupSettings(prefix, f"{where}.groups.{prefix}", {**outer.arguments, **changes}))
    return settings


def _flat(groups: Mapping[str, Any], where: str, parent: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """``{"a": {"lr": 1, "b": {"lr": 2}}}`` -> ``("a", {"lr": 1}), ("a.b", {"lr": 2})``."""
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
    """Refuse keys that the optimizer of a recipe does not take, for all weights or for a group, and wrong types.

    Args:
        config: see :func:`build_optimizer`.
        where: its place in the recipe.

    Raises:
        ValueError: naming the key.
    """
    if "name" not in config:
        raise ValueError(f"{where} needs a name.")
    if not isinstance(config.get("decay_all", False), bool):
        raise ValueError(f"{where}.decay_all={config['decay_all']!r}: expected bool.")
    for prefix, place, arguments in settings_of(config, where):
        registry.check("optimizer", config["name"], arguments, place, ("params",), () if prefix else _OURS)


def build_optimizer(config: Mapping[str, Any], model: nn.Module, where: str = "optimizer") -> Optimizer:
    """The optimizer of a model's trained weights, which it is given in torch's form of groups.

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
    """Each trained weight in one group, of the longest prefix of its names; a tied weight has several names.

    Args:
        settings: of :func:`settings_of`.
        model: whose ``model.`` before each name is left out.
        spare: norms, biases and embeddings have no weight decay.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name.removeprefix("model."))
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
        group = {**arguments, **({"weight_decay": 0.0} if spared else {}), "name": prefix or _NO_GROUP, "params": []}
        groups.setdefault((prefix, spared), group)["params"].append(weight)
    return list(groups.values())


def _begins(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")


def _why_none(prefix: str, names: list[str]) -> str:
    """Why a prefix matches no trained weight."""
    if any(_begins(name, prefix) for name in names):
        return f"every weight of {prefix} is frozen; train it, or leave the group out."
    parts = prefix.split(".")
    known = [".".join(parts[:count]) for count in range(len(parts))]
    parent = next(one for one in reversed(known) if not one or any(_begins(name, one) for name in names))
    depth = len(parent.split(".")) + 1 if parent else 1
    there = {".".join(name.split(".")[:depth]) for name in names if not parent or _begins(name, parent)}
    return f"no weight's name begins so. {did_you_mean(prefix, there)}"


def _undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Norms, biases and embeddings: vectors, and tables, which a tied head shares."""
    tables = {table for part in model.modules() if isinstance(part, nn.Embedding) for table in part.parameters(False)}
    return tables | {
        weight
        for name, weight in model.named_parameters()
        if sum(side > 1 for side in weight.shape) < 2 or _UNDECAYED.search(name.rpartition(".")[2])
    }


def check_new_weights(algorithms: Sequence[Algorithm], optimizer: Optimizer, where: str = "") -> None:
    """Refuse algorithms that make new weights in a model whose weights are in several groups.

    Args:
        algorithms: of the run.
        optimizer: of :func:`build_optimizer`.
        where: prefix of the recipe's keys. Default: none.

    Raises:
        ValueError: Composer adds new weights to the group of those that they replace, and does not find one here.
    """
    for algorithm in algorithms:
        if isinstance(algorithm, Factorize | SqueezeExcite) and len(optimizer.param_groups) > 1:
            raise ValueError(
                f"{where}algorithms: {type(algorithm).__name__} makes new weights, which are in no group of "
                f"{where}optimizer; set its decay_all=true and leave its groups out."
            )


class GroupLRMonitor(LRMonitor):
    """Composer's LRMonitor, which logs groups by name: ``lr-AdamW/vision``, and ``group0`` for weights of no group."""

    def batch_end(self, state: State, logger: Logger) -> None:
        for optimizer in state.optimizers:
            name = type(optimizer).__name__
            logger.log_metrics({f"lr-{name}/{group['name']}": group["lr"] for group in optimizer.param_groups})
